# heads: layer x query head heat map of one metric; grey = undefined.
csv = ARG1; out = ARG2; term = ARG3; metric = ARG4; unit = ARG5; subtitle = ARG6; budget = ARG7; policy = ARG8
fig = "heads"
set datafile separator comma columnheaders
stats csv using (column("layer")) nooutput name "L"
stats csv using (column("head")) nooutput name "H"
wide = 560 + (H_max + 1 > 40 ? 40 : H_max + 1) * 18.0
high = 260 + (L_max + 1 > 40 ? 40 : L_max + 1) * 15.0
load "style.gp"
set title policy." at ".budget.": ".metric." (".unit.")\n".subtitle.", mean over prompts" offset 0,-0.2
set xlabel "query head"
set ylabel "layer"
set colorbox user origin graph 1.04, graph 0 size graph 0.045, graph 1
set rmargin 12
set xrange [-0.5:H_max+0.5]
set yrange [L_max+0.5:-0.5]
set xtics 0, (H_max > 60 ? 16 : H_max > 31 ? 8 : H_max > 15 ? 4 : 1)
set ytics 0, (L_max > 60 ? 16 : L_max > 31 ? 8 : L_max > 9 ? 4 : 1)
set border 15
unset grid
set cbrange [0:*]
unset key
set object 1 rectangle from graph 0,0 to graph 1,1 behind fillcolor rgb "#d8d8d8" fillstyle solid noborder
plot csv using "head":"layer":"mean" with image pixels
