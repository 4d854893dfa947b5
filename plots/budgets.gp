# budgets: slots given to each layer / slots if the budget were spread evenly, per policy, bands over prompts.
csv = ARG1; out = ARG2; term = ARG3; subtitle = ARG6.ARG9; budget = ARG7
lines = 1; fig = "budgets"
load "style.gp"
stats csv using (column("layer")) nooutput name "L"
stats csv using (column("uniform_slots")) nooutput name "U"
set title "layer budgets at ".budget."\n".subtitle
set xlabel "layer"
set ylabel sprintf("slots of the layer / even share (%.0f KV slots)", U_mean)
set xrange [L_min-0.5:L_max+0.5]
set yrange [0:*]
set key outside right center vertical Left reverse samplen 3 spacing 1.0 font KEYFONT
plot for [i=1:SERIES] csv using (column("series") == i-1 ? column("layer") : NaN):"low":"high" \
         with filledcurves fillcolor rgb tint(POLICY[i], i-1) fillstyle solid noborder notitle, \
     1 with lines lc rgb "#606060" dt 2 lw 1.2 title "uniform", \
     for [i=1:SERIES] csv using (column("series") == i-1 ? column("layer") : NaN):"mean" \
         with linespoints linetype style(POLICY[i], i-1, VARIANT[i]) title LABEL[i]
