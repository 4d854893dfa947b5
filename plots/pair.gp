# pair.gp - one metric (mean, low, high) against another (x): a line per policy through its budgets. The caller sets fig, xname
# and yname, and logx for a logarithmic x.
lines = 1
load "style.gp"
# before an axis is set: ranges bind stats
stats csv using (unit = strcol("unit"), x_unit = strcol("x_unit"), logx && column("x") <= 0 ? NaN : column("x")) nooutput name "X"
metric = yname
name = yname
load "value_axis.gp"
if (logx && X_records > 0) {
    set logscale x 10
    set xrange [(X_min > X_max/1000 ? X_min/1.3 : X_max/1000):X_max*1.3]
}
set title yname." against ".xname."\n".subtitle
set xlabel xname.", ".x_unit.(logx ? " (log)" : "")
set ylabel yname.", ".unit.scale
set key outside right center vertical Left reverse samplen 3 spacing 1.0 font KEYFONT
plot for [i=1:SERIES] csv using (column("series") == i-1 ? column("x") : NaN):(drawn(column("mean"))):(edge(column("low"), column("mean"))):(edge(column("high"), column("mean"))) \
         with yerrorbars lc rgb word(STYLES, 4*index_of(POLICY[i], i-1)-2) lw 0.5 pt 0 notitle, \
     for [i=1:SERIES] csv using (column("series") == i-1 ? column("x") : NaN):(drawn(column("mean"))) \
         with linespoints linetype style(POLICY[i], i-1, VARIANT[i]) title LABEL[i]
