# curves: three metrics against mean bytes (log2), bands over prompts, one legend.
csv = ARG1; out = ARG2; term = ARG3; subtitle = ARG6.ARG9
lines = 1; octaves = 3; fig = "curves"
wide = 1500.0; high = 540.0
load "style.gp"
NAMES = "recall_contested head_error layer_error"
shown = ""
has(name) = strstrt(" ".shown." ", " ".name." ")
stats csv using (shown = has(strcol("metric")) ? shown : shown." ".strcol("metric"), 0) nooutput name "M"
PANELS = sum [i=1:3] (has(word(NAMES, i)) > 0)
load "bytes_axis.gp"
set multiplot title "retained attention and errors against bytes kept: ".subtitle noenhanced
unset key
at = 0
room = SERIES > 18 ? 0.70 : 0.80 # a long legend takes two columns
do for [k=1:3] {
    name = word(NAMES, k)
    if (has(name)) {
        set lmargin at screen 0.055 + at * room / PANELS
        set rmargin at screen 0.055 + (at + 1) * room / PANELS - 0.045
        set bmargin at screen 0.15
        set tmargin at screen 0.755
        set title name offset 0,0.3
        unset logscale y
        set yrange [*:*]
        stats csv using (strcol("metric") eq name ? (unit = strcol("metric_unit"), column("mean")) : NaN) nooutput name "U"
        load "value_axis.gp"
        set ylabel unit.scale offset 0.6,0
        plot for [i=1:SERIES] csv using (is_name(name) && column("series") == i-1 ? column("bytes") : NaN):(edge(column("low"), column("mean"))):(edge(column("high"), column("mean"))) \
                 with filledcurves fillcolor rgb tint(POLICY[i], i-1) fillstyle solid noborder notitle, \
             for [i=1:SERIES] csv using (is_name(name) && column("series") == i-1 ? column("bytes") : NaN):(drawn(column("mean"))) \
                 with linespoints linetype style(POLICY[i], i-1, VARIANT[i]) title LABEL[i]
        at = at + 1
    }
}
# The legend: a plot of nothing at the right.
unset title; unset xlabel; unset x2label; unset ylabel; unset border; unset tics; unset grid; unset logscale
set lmargin at screen room + 0.06; set rmargin at screen 0.99
set xrange [0:1]; set yrange [0:1]
set key at screen room + 0.055, screen 0.80 left top vertical Left reverse samplen 3 maxrows 18 spacing 1.0 font KEYFONT
plot for [i=1:SERIES] NaN with linespoints linetype style(POLICY[i], i-1, VARIANT[i]) title LABEL[i]
unset multiplot
