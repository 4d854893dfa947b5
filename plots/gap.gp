# gap: stacked bars, one a policy: what the budget itself costs, then what each part of the policy adds. A term below zero (a part
# that does better than the oracle's on this metric) hangs below the axis. The order of the stack is that of the legend.
csv = ARG1; out = ARG2; term = ARG3; metric = ARG4; unit = ARG5; subtitle = ARG6; budget = ARG7
lines = 1; fig = "gap"
set datafile separator comma columnheaders
stats csv using (column("series")) nooutput name "N"
wide = 640 + 52.0 * (N_max + 1 > 24 ? 24 : N_max + 1)
load "style.gp"
# places of v_gap from the axis outwards; ranking (1) is drawn where it is not split into prediction (2) and aggregation (3)
PLACES = "7 6 5 4 3 2 1"
NAMES = "'budget: no choice keeps it' 'staticness: one set for all rows' 'layer split' 'head split' 'ranking: aggregation' 'ranking: prediction' 'ranking, not split'"
COLOURS = "#e3e3e3 #b9c7d0 #56b4e9 #0072b2 #f0c14b #d55e00 #e08a3c"
array V[8 * SERIES]
array SPLIT[SERIES]
do for [i=1:8*SERIES] { V[i] = NaN }
do for [i=1:SERIES] { SPLIT[i] = 0 }
stats csv using (i = 8 * int(column("series")) + int(column("place")) + 1, V[i] = column("mean"), int(column("place")) == 3 ? (SPLIT[int(column("series")) + 1] = 1) : 0, i) nooutput name "X"
known(x) = x == x
part(s, p) = p == 1 && SPLIT[s+1] ? NaN : V[8*s+p+1]
# where a term begins: the sum of the terms of its sign that stand before it
sign(x) = x < 0 ? -1 : 1
base(s, k, x) = k < 2 ? 0 : (sum [j=1:k-1] (known(part(s, int(word(PLACES, j)))) && sign(part(s, int(word(PLACES, j)))) == sign(x) ? part(s, int(word(PLACES, j))) : 0))
has(k) = (sum [i=1:SERIES] known(part(i-1, int(word(PLACES, k))))) > 0
set title "where the loss comes from at ".budget."\n".subtitle.", mean over prompts" offset 0,-0.2
set ylabel "loss of ".metric." (".unit.")"
set xrange [-0.6:SERIES-0.4]
below(s) = sum [k=1:7] (known(part(s, int(word(PLACES, k)))) && part(s, int(word(PLACES, k))) < 0 ? part(s, int(word(PLACES, k))) : 0)
low = 0; top = 0
do for [i=1:SERIES] { low = below(i-1) < low ? below(i-1) : low; top = V[8*(i-1)+1] > top ? V[8*(i-1)+1] : top }
set yrange [(low < -0.02 * top ? 1.1 * low : low):1.04 * top] # a sliver below the axis needs no room of its own
set xtics ("" 0)
do for [i=1:SERIES] { set xtics add (LABEL[i] i-1) }
set xtics rotate by -35 left font KEYFONT
set xzeroaxis lt 1 lc rgb "#404040"
set key outside right center vertical Left reverse samplen 1.5 spacing 1.15 invert font KEYFONT
plot for [k=1:7] has(k) ? csv : "/dev/null" using (known(part(column("series"), int(word(PLACES, k)))) && column("place") == int(word(PLACES, k)) ? column("series") : NaN):(0):(column("series")-0.38):(column("series")+0.38):(base(int(column("series")), k, part(int(column("series")), int(word(PLACES, k))))):(base(int(column("series")), k, part(int(column("series")), int(word(PLACES, k)))) + part(int(column("series")), int(word(PLACES, k)))) \
         with boxxyerror fillcolor rgb word(COLOURS, k) fillstyle solid border lc rgb "#ffffff" title (has(k) ? word(NAMES, k) : "")
