# One HTML file: escapes a hostile prompt, asks nothing of the network, is the same bytes every time, every mean in it is what the
# SQL beside it gives, and a browser opens it from disk without a complaint, sorts it and picks.
. "$CLI/lib.sh"

printf '%s\n' '{"id":"evil","category":"<img src=x onerror=alert(1)>","text":"hello </script><script>alert(1)</script> & \"quotes\" the quick brown fox jumps over the lazy dog. The end is here, or is it not? Ask again.","prompt_end_byte":100,"evidence":[[6,40]]}' '{"id":"plain","category":"prose","text":"It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it was","prompt_end_byte":90}' >p.jsonl
ok kv-capture run -m "$ROOT/tests/golden/models/gguf/llama256/llama256.F16.gguf" --prompts p.jsonl -o cap
ok kv-sim run cap/evil.kvt cap/plain.kvt -p snapkv,streaming,random,oracle -b 10%,20%,50% --detail head --db r.db
ok kv-analyze report cap/evil.kvt --db r.db -o r.html --text snapkv,oracle
ok kv-analyze report cap/evil.kvt --db r.db -o again.html --text snapkv,oracle
check 'the same bytes again' cmp r.html again.html
if have python3; then
    check 'one safe page whose numbers are the database'\''s' python3 "$CLI/report.py" r.html r.db
else
    skip 'no python3: the page is not parsed'
fi
# what the budget costs and what the policy: figure and sentences; corners are no policies
check 'no --gap runs: a line says so' grep -q 'kv-sim run --gap' r.html
ok kv-sim run cap/evil.kvt cap/plain.kvt -p snapkv,random -b 20%,50% --gap --db gap.db
ok kv-analyze report --db gap.db -o gap.html -b 20%,50%
ok kv-analyze gap --db gap.db -b 20%
sed -n 's/^  \([a-z]*: at 20% it loses .*\)/<li>\1<\/li>/p' .out >sentences
check 'kv-analyze gap says something' test -s sentences
check 'the page says what kv-analyze gap says' sh -c 'grep "^<li>[a-z]*: at [0-9]*% it loses" gap.html | cmp - sentences'
check 'a corner is no policy' test "$(grep -c 'oracle=' gap.html)" -eq 0
if have gnuplot; then check 'the figure of it' grep -q 'aria-label="where the loss came from' gap.html; fi
if have python3; then check 'its numbers are the database'\''s' python3 "$CLI/report.py" gap.html gap.db; fi
ok kv-analyze report --db r.db -o small.html -p snapkv,oracle -b 20%
check 'a filtered page names its filter in the SQL' grep -q 'json_each' small.html

refused 2 'report needs -o' kv-analyze report --db r.db
refused 1 'none.db' kv-analyze report --db none.db -o out.html
refused 1 'nothing.kvt' kv-analyze report nothing.kvt --db r.db -o out.html
refused 2 'at most 4' kv-analyze report cap/evil.kvt --db r.db -o out.html --text a,b,c,d,e
refused 1 'nopolicy' kv-analyze report cap/evil.kvt --db r.db -o out.html --text nopolicy
refused 1 'cannot write' kv-analyze report --db r.db -o no/such/folder/out.html

# In a browser: the script below clicks, and writes what it saw into the document.
if have chromium; then
    cat >probe.js <<'END'
<script>
window.addEventListener("load", function () {
  var t = document.querySelector("table.sortable[id^=t-]"), b = t.querySelectorAll("thead button")[5], said = [];
  function column() { return Array.from(t.tBodies[0].rows).map(function (r) { return Number(r.cells[5].dataset.v); }); }
  b.click(); var up = column(); b.click(); var down = column();
  said.push(up.every(function (v, i) { return !i || up[i - 1] <= v; }) && down.every(function (v, i) { return !i || down[i - 1] >= v; }) ? "sorts" : "does not sort");
  var f = document.querySelector("select[data-filter]"), n = function () { return Array.from(t.tBodies[0].rows).filter(function (r) { return !r.hidden; }).length; };
  f.value = ""; f.dispatchEvent(new Event("change")); var all = n(); f.selectedIndex = 1; f.dispatchEvent(new Event("change"));
  said.push(n() < all && n() > 0 ? "filters" : "does not filter");
  var words = document.getElementById("words"), before = document.getElementById("token-summary").textContent, l = document.getElementById("pick-layer");
  l.value = "1"; l.dispatchEvent(new Event("change"));
  said.push(words.children.length > 20 && document.getElementById("token-summary").textContent !== before ? "picks" : "does not pick");
  said.push(words.textContent.indexOf("</scr" + "ipt><scr" + "ipt>alert(1)") >= 0 ? "shows the text" : "lost the text");
  document.body.dataset.probe = said.join(", ");
});
</script>
END
    cat r.html probe.js >probe.html
    chromium --headless=new --no-sandbox --disable-gpu --no-first-run --user-data-dir=./profile --host-resolver-rules='MAP * ~NOTFOUND' \
        --enable-logging=stderr --virtual-time-budget=5000 --dump-dom "file://$PWD/probe.html" >dom.html 2>browser.log
    check 'sorts, filters, picks, shows the text' grep -q 'data-probe="sorts, filters, picks, shows the text"' dom.html
    check 'no word on the console' test "$(grep -c 'CONSOLE' browser.log)" -eq 0
else
    skip 'no chromium: the page was not opened in a browser'
fi
