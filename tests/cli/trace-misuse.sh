# Words and numbers on kv-trace's command line that make no sense: exit 2, the nearest known word, no output.
. "$CLI/lib.sh"

synth a.kvt
refused 2 "did you mean 'verify'" kv-trace verfy a.kvt
refused 2 "did you mean 'slice'" kv-trace slcie a.kvt out.kvt
refused 2 "did you mean '--json'" kv-trace info a.kvt --jsno
refused 2 "did you mean '--layers'" kv-trace slice a.kvt out.kvt --layer 0
refused 2 "did you mean '--prompt-tokens'" kv-trace synth --promt-tokens 4 -o out.kvt
refused 2 "'b.kvt'" kv-trace info a.kvt b.kvt
refused 2 'file name' kv-trace info
refused 2 'file name' kv-trace verify
refused 2 '2 file names' kv-trace diff a.kvt
refused 2 '2 file names' kv-trace recover a.kvt
refused 2 --layers kv-trace slice a.kvt out.kvt --layers

refused 2 --stream kv-trace cat a.kvt -o out.npy
refused 2 qq kv-trace cat a.kvt --stream qq -o out.npy
refused 1 nll kv-trace cat a.kvt --stream nll -o out.npy
refused 1 logits kv-trace cat a.kvt --stream logits -o out.npy
refused 2 9 kv-trace cat a.kvt --stream q --layer 9 -o out.npy
refused 2 9 kv-trace cat a.kvt --stream q --head 9 -o out.npy
refused 2 190:300 kv-trace cat a.kvt --stream q --rows 190:300 -o out.npy
refused 2 x kv-trace cat a.kvt --stream q --rows x -o out.npy
refused 1 missing/out.npy kv-trace cat a.kvt --stream q -o missing/out.npy

refused 2 'no layer 5' kv-trace slice a.kvt out.kvt --layers 5
refused 2 'no head 3' kv-trace slice a.kvt out.kvt --heads 3
refused 2 0:0 kv-trace slice a.kvt out.kvt --layers 0:0
refused 2 0:999 kv-trace slice a.kvt out.kvt --tokens 0:999
refused 2 prefix kv-trace slice a.kvt out.kvt --tokens 5:9
refused 1 missing/out.kvt kv-trace slice a.kvt missing/out.kvt --layers 0

refused 2 -o kv-trace synth
refused 2 --layers kv-trace synth --layers 0 -o out.kvt
refused 2 --kv-heads kv-trace synth --q-heads 8 --kv-heads 3 -o out.kvt
refused 2 --prompt-tokens kv-trace synth --tokens 5 --prompt-tokens 9 -o out.kvt
refused 2 --tokens kv-trace synth --tokens 100000000 -o out.kvt
refused 2 12x kv-trace synth --tokens 12x -o out.kvt
refused 2 -3 kv-trace synth --seed -3 -o out.kvt
refused 1 missing/out.kvt kv-trace synth -o missing/out.kvt
refused 2 nan kv-trace diff a.kvt a.kvt --tol nan
refused 2 --tol kv-trace diff a.kvt b.kvt --tol -1
refused 2 --tol kv-trace diff a.kvt b.kvt --tol nan
