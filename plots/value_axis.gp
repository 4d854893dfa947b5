# value_axis.gp - y for the metric called `name`: logarithmic when lower is better (errors span two decades between random and
# the oracles, and 0 is the full cache, which leaves the axis), else linear. drawn(v) is what can be drawn of a value.
is_name(s) = strcol("metric") eq s
better = ""
unset logscale y # ranges and scales of an earlier panel would bind stats
set yrange [*:*]
stats csv using (is_name(name) ? (better = strcol("better"), column("mean")) : NaN) nooutput name "V"
stats csv using (is_name(name) && column("mean") > 0 ? column("mean") : NaN) nooutput name "W"
# stats without a number leaves its variables undefined
if (!exists("V_max")) { V_min = 0; V_max = 0 }
if (!exists("W_max")) { W_records = 0; W_max = 0 }
logy = better eq "lower" && W_records > 0 && W_max > 0
if (logy) {
    least = W_min > W_max/1000 ? W_min/1.3 : W_max/1000
    set logscale y 10
    set yrange [least:W_max*1.6]
    # 1 2 5 in each decade; the powers of ten alone when there are more than two.
    set ytics scale 1, 0.5 (1 1)
    set mytics default
    do for [e=floor(log10(least)):ceil(log10(W_max*1.6))] {
        do for [m=1:9] {
            shown_tic = m == 1 || ((m == 2 || m == 5) && W_max*1.6/least < 300)
            if (shown_tic) { set ytics add (sprintf("%g", m*10.0**e) m*10.0**e) } else { set ytics add ("" m*10.0**e 1) }
        }
    }
    set grid ytics mytics
} else {
    unset logscale y
    least = -1e300
    unset mytics
    set ytics scale 1, 0.5 autofreq
    set grid ytics
    if (V_max <= 1 && V_min >= 0 && better eq "higher") { set yrange [0:1] } else { set yrange [(V_min < 0 ? V_min : 0):*] }
}
drawn(v) = v >= least ? v : NaN
# An edge of the band: only where there is one (two prompts or more) and the mean is drawn, and not below the axis.
edge(v, mean) = v == v && mean >= least ? (v >= least ? v : least) : NaN
scale = logy ? " (log)" : ""
