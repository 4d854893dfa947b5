# attention: the map of one head (log10 of the weight) and, above it, the columns a policy keeps. A cell of a wide map is
# the largest weight in it. ARG7 = prompt tokens, ARG8 = tokens per column of cells, ARG9 = "first row, tokens per row,
# tokens".
csv = ARG1; out = ARG2; term = ARG3; subtitle = ARG4."\n".ARG6
P = int(ARG7); BIN = int(ARG8); ROW0 = int(word(ARG9, 1)); ROWBIN = int(word(ARG9, 2)); N = int(word(ARG9, 3))
fig = "attention"; wide = 880.0; high = 860.0
load "style.gp"
set lmargin at screen 0.11
set rmargin at screen 0.85
set xrange [-0.5:N-0.5]
unset key
unset grid
set border 15
stats csv using (column("row")) nooutput name "R" # the last row of cells sees every column
set multiplot

# Kept columns: black; partly kept cells of a binned map: grey.
set tmargin at screen 0.915
set bmargin at screen 0.885
set title subtitle offset 0,-0.2
unset xtics
unset ytics
set ylabel "kept" rotate by 0 offset 0,0
set yrange [0:1]
set style fill solid 1 noborder
grey(v) = int(255 - 255 * v + 0.5) * 65793
plot csv using (column("row") == R_max ? column("column") : NaN):(0.5):(column("column") - 0.53*BIN):(column("column") + 0.53*BIN):(0):(1):(grey(column("kept"))) \
     with boxxyerror linecolor rgb variable

# The map. Dashes: the end of the prompt, where the cut is made.
unset title
set tmargin at screen 0.875
set bmargin at screen 0.085
set xtics out nomirror
set ytics out nomirror
set xlabel "key position (tokens".(BIN > 1 ? sprintf(", %d to a cell)", BIN) : ")")."; dashes: end of the prompt"
set ylabel "query position (tokens".(ROWBIN > 1 ? sprintf(", %d to a cell)", ROWBIN) : ")") rotate by 90
set yrange [N-0.5:ROW0-0.5]
set cbrange [-5:0]
set cblabel BIN*ROWBIN > 1 ? "log10 of the largest attention weight in the cell" : "log10 of the attention weight"
set colorbox user origin screen 0.87, screen 0.085 size screen 0.025, screen 0.79
set arrow 1 from P-0.5, ROW0-0.5 to P-0.5, N-0.5 nohead front dt 2 lw 1 lc rgb "#d55e00"
set arrow 2 from -0.5, P-0.5 to N-0.5, P-0.5 nohead front dt 2 lw 1 lc rgb "#d55e00"
plot csv using "column":"row":(column("weight") > 0 ? log10(column("weight")) : NaN) with image
unset multiplot
