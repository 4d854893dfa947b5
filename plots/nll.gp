# nll: measured loss of the model (log) against layer error (log): a metric to believe puts all policies on one line.
csv = ARG1; out = ARG2; term = ARG3; subtitle = ARG6.(ARG9 eq "" ? "" : ", bars: 95% bootstrap intervals")
fig = "nll"; xname = "layer_error"; yname = "delta_nll"; logx = 1
load "pair.gp"
