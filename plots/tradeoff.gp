# tradeoff: layer error (log) against recall; two policies of equal recall differ by what they drop.
csv = ARG1; out = ARG2; term = ARG3; subtitle = ARG6.(ARG9 eq "" ? "" : ", bars: 95% bootstrap intervals")
fig = "tradeoff"; xname = "recall"; yname = "layer_error"; logx = 0
load "pair.gp"
