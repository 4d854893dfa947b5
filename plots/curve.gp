# curve: one metric against mean bytes (log2), bands over prompts; the upper axis is the share of the full cache.
csv = ARG1; out = ARG2; term = ARG3; metric = ARG4; unit = ARG5; subtitle = ARG6.ARG9
lines = 1; fig = "curve"
load "style.gp"
load "bytes_axis.gp"
name = metric
load "value_axis.gp"
set title metric." against bytes kept\n".subtitle
set ylabel metric.", ".unit.scale
set key outside right center vertical Left reverse samplen 3 spacing 1.0 font KEYFONT
plot for [i=1:SERIES] csv using (column("series") == i-1 ? column("bytes") : NaN):(edge(column("low"), column("mean"))):(edge(column("high"), column("mean"))) \
         with filledcurves fillcolor rgb tint(POLICY[i], i-1) fillstyle solid noborder notitle, \
     for [i=1:SERIES] csv using (column("series") == i-1 ? column("bytes") : NaN):(drawn(column("mean"))) \
         with linespoints linetype style(POLICY[i], i-1, VARIANT[i]) title LABEL[i]
