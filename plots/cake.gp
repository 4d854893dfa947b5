# cake: spatial dispersion, temporal shift and preference by layer, and the layers' budgets after each stage of the cascade.
csv = ARG1; out = ARG2; term = ARG3; subtitle = ARG6; budget = ARG7; tokens = ARG8
fig = "cake"
wide = 1000.0; high = 760.0
load "style.gp"
stats csv using (column("layer")) nooutput name "L"
stats csv using (column("slots")) nooutput name "B"
set multiplot layout 2,2 title "CAKE at ".budget." (".tokens." tokens per KV head on average)\n".subtitle
unset key
set xlabel "layer"
set xrange [L_min-0.5:L_max+0.5]
set yrange [0:*]
ORANGE = "#d55e00"
set title "spatial dispersion H: entropy of the window's attention"
set ylabel "nats, summed over rows and heads"
plot csv using "layer":"dispersion" with linespoints lc rgb "#0072b2" pt 7 ps 0.6
set title "temporal shift V: variance over the window's rows"
set ylabel "summed over columns and heads"
plot csv using "layer":"shift" with linespoints lc rgb "#009e73" pt 13 ps 0.6
set title "preference H V, as a share of all layers"
set ylabel "share"
plot 1.0/(L_max-L_min+1) with lines lc rgb "#606060" dt 2, csv using "layer":"share" with boxes fill solid 0.6 lc rgb ORANGE
set title "slots a KV head keeps after each stage of the cascade"
set ylabel "stage: the layer that has just attended"
set yrange [L_max+0.5:L_min-0.5]
set cblabel "slots, log scale" offset 1.5,0
set logscale cb
least = B_min > 0 ? B_min : 1
set cbrange [least:(B_max > least ? B_max : 2*least)]
unset grid
plot csv using "layer":"stage":(0.5):(0.5):"slots" with boxxyerror fc palette fillstyle solid noborder
unset multiplot
