# style.gp - what every figure shares: terminal, fonts, and one colour, dash and point per policy.
#
# A script sets csv, out and term from its arguments and loads this file first. Then `style(policy, series, variant)` is a
# line type, `tint(policy, series)` the same colour as a transparent fill, and SERIES, LABEL[], POLICY[], VARIANT[] describe
# the lines in the CSV when it has a column `series`.
set encoding utf8
set datafile separator comma missing "" columnheaders
wide = exists("wide") ? wide : 900.0
high = exists("high") ? high : 560.0
if (term eq "svg") {
    set terminal svg size 1.3*wide, 1.3*high dynamic noenhanced name fig font "Helvetica,Arial,sans-serif,16" linewidth 1.4 background "white"
} else { if (strstrt(GPVAL_TERMINALS, "pngcairo")) {
    set terminal pngcairo size 2*wide, 2*high noenhanced font "Sans,22" linewidth 2.4 background "white"
} else {
    set terminal png size 2*wide, 2*high noenhanced font "Sans,22" linewidth 2 background "white"
} }
set output out
set border 3 lc rgb "#404040"
set tics nomirror out textcolor rgb "#202020"
set format "%g"
set grid back lc rgb "#e4e4e4" lt 1 lw 0.6
KEYFONT = term eq "svg" ? "Helvetica,Arial,sans-serif,15" : "Sans,20"
set key noenhanced

# Okabe and Ito's palette (distinct for colour-blind readers) and darker or lighter shades of it: policies of one family have
# one hue, and the dash and the point tell them apart in grey.
#              name                colour    dash     point
STYLES = "\
  full                #000000 solid    0 \
  random              #9a9a9a .        7 \
  recency             #7a7a7a -        11 \
  streaming           #5a5a5a -.       13 \
  knorm               #b8a000 _        13 \
  keydiff             #8a7800 _.       15 \
  h2o                 #e69f00 solid    5 \
  tova                #a06a00 -        11 \
  snapkv              #0072b2 solid    7 \
  pyramidkv           #009e73 solid    13 \
  ada-snapkv          #56b4e9 _        7 \
  ada-pyramidkv       #4fc3a1 _-       13 \
  criticalkv          #003f6b -..      15 \
  expected-attention  #7b4fa3 -        11 \
  headkv              #005f45 .-       15 \
  lava                #cc79a7 solid    15 \
  cake                #d55e00 solid    9 \
  oracle              #606060 -        5 \
  oracle-layer        #303030 -.       7 \
  oracle-global       #000000 solid    9 \
  other0              #a02c5d -        5 \
  other1              #3b7a2b _.       7 \
  other2              #5d5fb0 -.       9 \
  other3              #8c510a .        11 \
  other4              #c2185b solid    13 \
  other5              #4d7c8a _        15 "
KNOWN = 20
OTHERS = 6
DASHES = "- . -. _ _. _.."
place(name) = sum [i=1:KNOWN] (word(STYLES, 4*i-3) eq name ? i : 0)
index_of(name, series) = (place(name) > 0 ? place(name) : KNOWN + 1 + int(series) % OTHERS)
# Variants of a policy (other parameters) keep its colour and change dash and point.
style(name, series, variant) = 100 + 10 * index_of(name, series) + (int(variant) % 7)
# The filled symbols 5 7 9 11 13 15; 0 is a dot.
point(i, v) = word(STYLES, 4*i) eq "0" ? 0 : 5 + (int(word(STYLES, 4*i)) - 5 + 2*v) % 12
do for [i=1:KNOWN+OTHERS] {
    do for [v=0:6] {
        d = v == 0 ? word(STYLES, 4*i-1) : word(DASHES, v)
        d = d eq "solid" ? "dt 1" : sprintf("dt '%s'", d)
        heavy = word(STYLES, 4*i-3) eq "cake" ? 2.2 : 1.5
        eval sprintf("set linetype %d lc rgb '%s' %s lw %g pt %d ps %g", 100 + 10*i + v, word(STYLES, 4*i-2), d, heavy, point(i, v), term eq "svg" ? 0.5 : 0.85)
    }
}
hex(s) = int("0x".s[2:7])
tint(name, series) = 0xeb000000 + hex(word(STYLES, 4*index_of(name, series)-2))

# Light to dark in grey as well as in colour (viridis).
set palette defined (0 "#440154", 1 "#472c7a", 2 "#3b518b", 3 "#2c718e", 4 "#21908d", 5 "#27ad81", 6 "#5cc863", 7 "#aadc32", 8 "#fde725")

# The lines of the figure, from the columns label, policy, series and variant.
if (exists("lines")) {
    stats csv using (column("series")) nooutput name "S"
    SERIES = int(S_max) + 1
    array LABEL[SERIES]
    array POLICY[SERIES]
    array VARIANT[SERIES]
    stats csv using (i = int(column("series")) + 1, LABEL[i] = strcol("label"), POLICY[i] = strcol("policy"), VARIANT[i] = column("variant"), i) nooutput name "S"
}
