# bytes_axis.gp - x: mean bytes of K and V on a log2 scale, KiB MiB GiB; x2: share of the full cache.
stats csv using (column("bytes")) nooutput name "X"
stats csv using (column("full_bytes")) nooutput name "F"
set logscale x 2
set xrange [X_min/1.06 : X_max*1.06]
# Ticks at powers of two, in KiB MiB GiB; every second one when there are many.
unit_of(k) = word("B KiB MiB GiB TiB", int(k)/10 + 1)
octaves = exists("octaves") ? octaves : 7
LO = ceil(log(X_min/1.06)/log(2) - 1e-9); HI = floor(log(X_max*1.06)/log(2) + 1e-9)
set xtics out nomirror scale 1 ("" 1)
do for [k=LO:HI:(HI - LO > octaves ? 2 : 1)] { set xtics add (sprintf("%d %s", 2**(k%10), unit_of(k)) 2.0**k) }
set xlabel "mean bytes of K and V per prompt (log2)"
set logscale x2 2
set x2range [X_min/1.06/F_mean : X_max*1.06/F_mean]
set x2tics ("1%%" 0.01, "2%%" 0.02, "3.2%%" 0.032, "5%%" 0.05, "10%%" 0.1, "20%%" 0.2, "40%%" 0.4, "100%%" 1) nomirror out
set x2label "share of the full cache" offset 0,-0.2
set title offset 0,0.4
set border 7
