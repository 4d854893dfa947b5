#!/bin/sh
# arrows.sh - fails when an #include points up the tree: each folder may see only those listed.
allowed() {
    case $1 in
    traces | kernels) echo "$1/" ;;
    capture) echo "capture/ traces/ kernels/" ;;
    sim) echo "sim/ traces/ kernels/ capture/engine.h capture/model.h" ;;
    analyze) echo "analyze/ sim/ traces/ kernels/" ;;
    esac
}
bad=0
for m in traces kernels capture sim analyze; do
    for inc in $(grep -rhoE --include='*.[ch]' --include='*.cu' '^#include "[a-z]+/[a-z_/]+\.[a-z.]+"' "$m" | sed 's/.*"\(.*\)"/\1/' | sort -u); do
        ok=
        for a in $(allowed $m); do case $inc in "$a"*) ok=1 ;; esac; done
        [ -n "$ok" ] || { echo "arrows: $m/ must not include $inc"; bad=1; }
    done
done
if find traces kernels capture sim analyze tests -name '*.[ch]' | xargs -n1 basename | grep -v '^main\.c$' | sort | uniq -d | grep .; then
    echo "arrows: file names above stand twice"
    bad=1
fi
exit $bad
