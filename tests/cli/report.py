"""report.py PAGE DB: a report is one valid page that asks nothing of the network, escapes what it shows, and every number in its
words and every mean in its tables is what the SQL printed beside it gives."""
import html
import html.parser
import json
import re
import sqlite3
import sys

VOID = {"meta", "link", "br", "img", "input", "hr", "rect", "path", "line", "circle", "use"}


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.refs, self.scripts, self.errors = [], [], [], [], []
        self.tables, self.sql, self.cell, self.code = [], [], None, None

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if len(a) != len(attrs):
            self.errors.append(f"<{tag}> has an attribute twice")
        if "id" in a:
            self.ids.append(a["id"])
        for k, v in attrs:
            if k in ("src", "href", "xlink:href", "action", "data") or k.startswith("on"):
                self.refs.append((k, v))
        if tag == "script":
            self.scripts.append([a.get("type"), ""])
        if tag == "table":
            self.tables.append({"id": a.get("id"), "rows": [], "sql": None})
        if tag == "tr" and self.tables:
            self.tables[-1]["rows"].append([])
        if tag in ("td", "th") and self.tables:
            self.cell = {"tag": tag, "v": a.get("data-v"), "text": ""}
            self.tables[-1]["rows"][-1].append(self.cell)
        if tag == "code":
            self.code = ""
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        if not self.open or self.open[-1] != tag:
            self.errors.append(f"</{tag}> closes {self.open[-1:]}")
            return
        self.open.pop()
        if tag == "code" and self.code is not None and self.tables:
            if re.match(r"\s*(SELECT|WITH)", self.code) and self.tables[-1]["sql"] is None:
                self.tables[-1]["sql"] = self.code
            self.code = None
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1][1] += data
        if self.cell is not None:
            self.cell["text"] += data
        if self.code is not None:
            self.code += data


def section(text, name):
    """Sentences of a section and the rows of its SQL statements."""
    body = re.search(rf'<section id="{name}">(.*?)</section>', text, re.S).group(1)
    said = [html.unescape(re.sub(r"<[^>]+>", "", s)) for s in re.findall(r"<li>(.*?)</li>", body, re.S)]
    return said, [html.unescape(c) for c in re.findall(r"<code>((?:SELECT|WITH).*?)</code>", body, re.S)]


def words(text, db):
    """The verdict's means and differences, and the terms of the loss; how many numbers were held against the database."""
    said, sql = section(text, "verdict")
    rows = [r for s in sql for r in db.execute(s)]  # budget, policy, spec, other, its spec, difference, mean
    seen = 0
    for s in said:
        budget, policy, mean = re.match(r"At (\S+) .*?: (\S+) has the \w+ \w+, ([-+.e\d]+)", s).groups()
        mine = [r for r in rows if r[0] == budget and r[1] == policy.split(":")[0] and "%.4g" % r[6] == mean]
        assert mine, s
        for other, way, d in re.findall(r", (\S+) is (lower|higher) by ([-+.e\d]+)", s):
            d = float(d) if way == "higher" else -float(d)
            assert any(r[3] == other.split(":")[0] and "%.4g" % r[5] == "%.4g" % d for r in mine), (s, other)
            seen += 1
        seen += 1
    said, sql = section(text, "gap")
    for s in said:
        policy, lost, forward, reverse = re.match(r"(\S+): at \S+ it loses (\S+) points of [a-z_]+: (.*?\d)\)?(?:; the other way round (.*?))?\.(?: Its |$)", s).groups()
        for way, terms in (("forward", lost + " " + forward), ("reverse", reverse or "")):
            have = {"%.1f" % (100 * r[9]) for q in sql for r in db.execute(q) if r[0] == policy and r[7] == way}
            for x in re.findall(r"-?\d+\.\d", terms):
                assert x in have, (s, x, have)
                seen += 1
    return seen


def main():
    text = open(sys.argv[1], encoding="utf-8").read()
    db = sqlite3.connect(f"file:{sys.argv[2]}?mode=ro", uri=True)
    page = Page()
    page.feed(text)
    assert not page.errors and not page.open, (page.errors[:3], page.open)
    assert len(set(page.ids)) == len(page.ids), "an id twice"
    assert all(k == "href" and v.startswith("#") or k == "xlink:href" and v.startswith("#") for k, v in page.refs), page.refs[:5]
    assert [t for t, _ in page.scripts if t != "application/json"] == [None], "scripts: the page's own and its data"
    for kind, body in page.scripts:
        if kind == "application/json":
            assert "<" not in body
            json.loads(body)
    assert "default-src 'none'" in text
    assert "<script>alert" not in text and "<img" not in text
    compared = words(text, db)
    for t in page.tables:
        if t["sql"] is None:
            continue
        cur = db.execute(t["sql"])
        names = [c[0] for c in cur.description]
        rows = [dict(zip(names, r)) for r in cur]
        assert rows, "a statement without rows: " + t["sql"]
        if t["id"] and t["id"].startswith("t-"):  # policies x budgets: the column mean
            got = sorted(float(r[5]["v"]) for r in t["rows"][1:] if r[5]["v"])
            want = sorted(r["mean"] for r in rows if r["mean"] is not None)
            assert len(got) == len(want), (t["id"], len(got), len(want))
            for x, y in zip(got, want):
                assert abs(x - y) <= 1e-12 * max(1, abs(y)), (t["id"], x, y)
                compared += 1
        elif "mean" in names:  # a map: every value shown is one of the statement's
            shown = [c["text"] for r in t["rows"][1:] for c in r[1:] if c["text"] != "-"]
            have = {"%.3g" % r["mean"] for r in rows if r["mean"] is not None}
            assert shown and all(x in have for x in shown)
            compared += len(shown)
    assert compared > 20, compared


main()
