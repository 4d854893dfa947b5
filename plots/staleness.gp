# staleness: one metric against the decode step at one budget, a line per policy, bands over prompts. Rows beyond 200 come in bins.
csv = ARG1; out = ARG2; term = ARG3; metric = ARG4; unit = ARG5; subtitle = ARG6.ARG9; budget = ARG7
lines = 1; fig = "staleness"
load "style.gp"
# before an axis is set: ranges bind stats
stats csv using (column("step")) nooutput name "X"
stats csv using (width = column("width")) nooutput name "B"
# from here on the answers of some prompts have ended
stats csv using (column("n")) nooutput name "P"
stats csv using (column("n") < P_max ? column("step") : NaN) nooutput name "F"
name = metric
load "value_axis.gp"
# a point every so often tells the lines apart in grey and leaves the line to be seen
every_n = X_max > 24*width ? floor(X_max / (12.0*width)) : 1
set title metric." against the decode step at ".budget."\n".subtitle
set xlabel "rows since the cut".(width > 1 ? sprintf(", mean of %d a point", width) : "")
set xrange [0:X_max > 0 ? X_max : 1]
if (exists("F_min") && F_min > 0) {
    set arrow from first F_min, graph 0 to first F_min, graph 1 nohead back dt 3 lw 0.6 lc rgb "#808080"
    set label sprintf("from here on fewer than %d prompts", P_max) at first F_min, graph 0.965 offset 0.5,0 font KEYFONT textcolor rgb "#606060"
}
set ylabel metric.", ".unit.scale
set key outside right center vertical Left reverse samplen 3 spacing 1.0 font KEYFONT
plot for [i=1:SERIES] csv using (column("series") == i-1 ? column("step") : NaN):(edge(column("low"), column("mean"))):(edge(column("high"), column("mean"))) \
         with filledcurves fillcolor rgb tint(POLICY[i], i-1) fillstyle solid noborder notitle, \
     for [i=1:SERIES] csv using (column("series") == i-1 ? column("step") : NaN):(drawn(column("mean"))) \
         with linespoints linetype style(POLICY[i], i-1, VARIANT[i]) pointinterval every_n title LABEL[i]
