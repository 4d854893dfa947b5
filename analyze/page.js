"use strict";
// Tables that sort by a click or by Enter on a column's head; numbers from data-v where a cell has it.
document.querySelectorAll("table.sortable").forEach(function (table) {
  var heads = table.querySelectorAll("thead th"), body = table.tBodies[0];
  function key(row, column) {
    var cell = row.cells[column], v = cell.dataset.v;
    return v === undefined ? cell.textContent : v === "" ? null : Number(v);
  }
  heads.forEach(function (head, column) {
    var button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.textContent = "";
    head.appendChild(button);
    button.addEventListener("click", function () {
      var down = head.getAttribute("aria-sort") === "ascending", rows = Array.from(body.rows);
      heads.forEach(function (h) { h.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      rows.sort(function (x, y) {
        var a = key(x, column), b = key(y, column);
        if (a === null || b === null) return (a === null) - (b === null); // undefined values last, either way
        var d = typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
        return down ? -d : d;
      });
      rows.forEach(function (row) { body.appendChild(row); });
    });
  });
});

// Rows of a table by the value of one column: the server wrote the choices.
document.querySelectorAll("select[data-filter]").forEach(function (select) {
  var rows = document.getElementById(select.dataset.filter).tBodies[0].rows;
  function apply() {
    Array.from(rows).forEach(function (row) { row.hidden = select.value !== "" && row.dataset.budget !== select.value; });
  }
  select.closest("form").hidden = false;
  select.addEventListener("change", apply);
  apply();
});

// The token view. Encodings: text = base64 of UTF-8, len = bytes of each token; kept = bits [layer][head][token], most
// significant first; mass = one byte per [layer][KV head][token], 0 = none, else 1e-7 * 1e7^((byte-1)/254).
(function () {
  var source = document.getElementById("tokens");
  if (!source) return;
  var views = JSON.parse(source.textContent), byId = function (id) { return document.getElementById(id); };
  var words = byId("words"), picks = ["pick-trace", "pick-a", "pick-b", "pick-layer", "pick-head"].map(byId);
  var MASS = new Float64Array(256);
  for (var m = 1; m < 256; m++) MASS[m] = 1e-7 * Math.pow(1e7, (m - 1) / 254);

  function bytes(text) {
    var raw = atob(text), out = new Uint8Array(raw.length);
    for (var i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  }
  function options(select, labels) {
    select.textContent = "";
    labels.forEach(function (label, i) {
      var option = document.createElement("option");
      option.value = i;
      option.textContent = label;
      select.appendChild(option);
    });
  }
  function open(view) {
    if (view.pieces) return;
    view.pieces = [];
    if (view.text === null) for (var i = 0; i < view.P; i++) view.pieces.push("<" + i + ">");
    else {
      var decoder = new TextDecoder(), all = bytes(view.text), at = 0;
      view.len.forEach(function (n) { // a token may hold part of a letter: it shows with the token that completes it
        view.pieces.push(decoder.decode(all.subarray(at, at + n), { stream: true }));
        at += n;
      });
    }
    view.evidence = new Set(view.ev);
    if (view.mass) view.mass = bytes(view.mass);
    view.picks.forEach(function (p) { p.kept = bytes(p.kept); });
  }
  function kept(view, pick, layer, query, token) {
    var head = pick.heads === 1 ? 0 : pick.heads === view.q ? query : Math.floor(query / (view.q / view.kv));
    var bit = (layer * pick.heads + head) * view.P + token;
    return pick.kept[bit >> 3] >> (7 - (bit & 7)) & 1;
  }
  function draw() {
    var view = views[picks[0].value], a = view.picks[picks[1].value], b = view.picks[picks[2].value];
    var layer = Number(picks[3].value) - 1, head = Number(picks[4].value) - 1, group = view.q / view.kv;
    var l0 = layer < 0 ? 0 : layer, l1 = layer < 0 ? view.layers.length : layer + 1;
    var h0 = head < 0 ? 0 : head, h1 = head < 0 ? view.kv : head + 1;
    var each = a.heads > view.kv || b.heads > view.kv ? group : 1, slots = (l1 - l0) * (h1 - h0);
    var names = ["both", "a", "b", "none"], total = [0, 0, 0, 0], massOf = [0, 0, 0, 0], tokens = [], top = 0;
    for (var t = 0; t < view.P; t++) {
      var n = [0, 0, 0, 0], mass = 0;
      for (var l = l0; l < l1; l++) for (var h = h0; h < h1; h++) {
        var m = view.mass ? MASS[view.mass[(l * view.kv + h) * view.P + t]] / (slots * each) : 0;
        for (var g = 0; g < each; g++) {
          var inA = kept(view, a, l, h * group + g, t), inB = kept(view, b, l, h * group + g, t);
          var state = inA && inB ? 0 : inA ? 1 : inB ? 2 : 3;
          n[state]++;
          massOf[state] += m;
          mass += m;
        }
      }
      var best = 0;
      for (var k = 0; k < 4; k++) {
        if (n[k] > n[best]) best = k;
        total[k] += n[k] / (slots * each);
      }
      top = Math.max(top, mass);
      tokens.push({ n: n, mass: mass, state: names[best] });
    }
    var part = document.createDocumentFragment();
    tokens.forEach(function (token, i) {
      var span = document.createElement("span"), n = token.n;
      span.textContent = view.pieces[i];
      span.className = token.state + (view.evidence.has(i) ? " ev" : "");
      if (token.mass > 1e-5) span.style.setProperty("--m", Math.max(0, 1 + Math.log(token.mass / top) / Math.log(1e4)).toFixed(2));
      span.title = "token " + i + (view.mass ? ", mass " + token.mass.toPrecision(3) : "") + "; of " + slots * each +
        " slots: both " + n[0] + ", A only " + n[1] + ", B only " + n[2] + ", neither " + n[3];
      part.appendChild(span);
    });
    words.textContent = "";
    words.appendChild(part);
    var sum = massOf[0] + massOf[1] + massOf[2] + massOf[3];
    byId("token-summary").textContent = ["both", "A only", "B only", "neither"].map(function (name, k) {
      return name + " " + (100 * total[k] / view.P).toFixed(1) + " % of the tokens" +
        (sum > 0 ? ", " + (100 * massOf[k] / sum).toFixed(1) + " % of the mass" : "");
    }).join("; ") + " (" + slots * each + (slots * each === 1 ? " slot)." : " slots).");
  }
  function choose() {
    var view = views[picks[0].value];
    open(view);
    var labels = view.picks.map(function (p) { return p.policy + " at " + p.budget; });
    options(picks[1], labels);
    options(picks[2], labels);
    picks[2].value = Math.min(1, labels.length - 1);
    options(picks[3], ["all (share of slots)"].concat(view.layers.map(String)));
    options(picks[4], ["all"].concat(Array.from({ length: view.kv }, function (_, i) { return String(i); })));
    draw();
  }
  options(picks[0], views.map(function (v) { return v.name; }));
  picks[0].addEventListener("change", choose);
  picks.slice(1).forEach(function (select) { select.addEventListener("change", draw); });
  byId("pickers").hidden = false;
  byId("legend").hidden = false;
  choose();
})();
