"use strict";
// The side panel and the tooltip.

const Panels = (() => {
  const { groups, boxes, scopes, axes } = Model;
  let show = () => {}; // set by main.js: selects what is clicked

  const p = (...children) => el("p", {}, ...children);
  const soft = (text) => el("span", { class: "soft" }, text);
  const h3 = (text) => el("h3", {}, text);
  const goes = (what, ...children) => el("span", { class: "link", role: "link", tabindex: 0, onclick: () => show(what), onkeydown: (e) => e.key === "Enter" && show(what) }, ...children);
  const count = (number, word) => `${Words.full(number)} ${word}${number === 1 ? "" : "s"}`;

  function share(group) {
    const { kept, of } = groups[group];
    if (!Model.changed) return soft(count(of, "unit"));
    const fill = el("i", { style: `width:${(100 * kept) / of}%` });
    return el("span", { class: "num" }, el("span", { class: `bar ${colourOf(group)}` }, fill), soft(` ${kept} of ${of} kept`));
  }

  const few = (list, limit) => [...list.slice(0, limit), ...(list.length > limit ? [p(soft(`and ${list.length - limit} more`))] : [])];
  const groupLine = (group) => p(goes({ kind: "group", at: group }, chip(group), " ", groups[group].name), " ", share(group));

  /** Before and after; one number where nothing changes. */
  function pair(values, unit) {
    if (!values.length || values.every((value) => !value)) return null;
    const [before, after] = values;
    if (after === undefined || (after === before && !Model.changed)) return Words.short(before, unit);
    return `${Words.short(before, unit)} → ${Words.short(after, unit)} (${Words.share(after, before)})`;
  }

  function costs(members) {
    const rows = [["MACs", "macs", ""], ["parameters", "params", ""], ["time", "seconds", "s"]].map(([name, field, unit]) => [name, pair(Model.sum(members, field), unit)]);
    return rows.filter((row) => row[1]).map(([name, text]) => p(soft(`${name} `), text));
  }

  const shape = (box) => {
    const [before, after] = box.shape;
    if (!before) return null;
    const text = [before, after].map(Words.size);
    return p(soft("result "), text[0] === text[1] ? text[0] : `${text[0]} → ${text[1]}`);
  };

  function axisLine(k) {
    const axis = axes[k];
    const line = p(goes({ kind: "axis", at: k }, axis.name), soft(` ${axis.is}, `), axis.kept < axis.of ? `${axis.kept} of ${axis.of} kept` : count(axis.of, "position"));
    axis.groups.forEach((group) => line.append(" ", goes({ kind: "group", at: group }, chip(group))));
    if (axis.pinned) line.append(el("br"), soft(`${axis.pinned === axis.size ? "all" : axis.pinned} pinned: ${axis.why.map((reason) => Model.reasons[reason]).join("; ")}`));
    return line;
  }

  /** Groups that several inputs of a box have: the box holds them to one shape, as an addition does. */
  function joins(k) {
    const by = new Map();
    for (const [source, target, shared] of Model.edges) if (target === k) for (const group of shared) by.set(group, [...(by.get(group) || []), source]);
    return [...by].filter(([, sources]) => sources.length > 1).map(([group, sources]) => p(chip(group), soft("held to one shape here, from "), sources.map((source) => boxes[source].title).join(" and ")));
  }

  function near(words, k, mine, other) {
    const found = Model.edges.filter((edge) => edge[mine] === k).map((edge) => edge[other]);
    return found.length ? p(soft(`${words} `), ...found.slice(0, 12).flatMap((at) => [goes({ kind: "layer", at }, boxes[at].title), " "]), found.length > 12 ? soft(`and ${found.length - 12} more`) : "") : null;
  }

  function box(k) {
    const each = boxes[k];
    const free = each.axes.filter((axis) => axes[axis].pinned < axes[axis].size);
    const pinned = each.axes.filter((axis) => axes[axis].pinned === axes[axis].size);
    return [
      el("h2", {}, each.title), p(soft(`${each.calls.join(", ")}; nodes ${each.nodes.join(", ")}`)), shape(each), ...costs([k]),
      each.carried.length ? h3("groups of its result") : null, ...each.carried.map(groupLine),
      ...(each.touched.length > each.carried.length ? [h3("other groups that it reads"), ...each.touched.filter((group) => !each.carried.includes(group)).map(groupLine)] : []),
      ...joins(k), near("reads", k, 1, 0), near("is read by", k, 0, 1),
      free.length ? h3("axes that can be cut") : null, ...free.map(axisLine), pinned.length ? h3("pinned axes") : null, ...pinned.map(axisLine),
    ];
  }

  function scope(k, isOpen, toggle) {
    const members = Model.boxesIn(k);
    const held = Model.union(members, "touched");
    return [
      el("h2", {}, scopes[k].title), p(soft(`${scopes[k].class || "module"}, ${members.length} boxes`)),
      p(el("button", { onclick: toggle }, isOpen ? "fold" : "unfold")), ...costs(members), h3(count(held.length, "group")), ...held.map(groupLine),
    ];
  }

  /** One cell a unit, dark where it is kept. */
  function units(k) {
    const { units: number } = groups[k];
    if (groups[k].left === null) return null;
    const width = Math.min(number, 64);
    const canvas = el("canvas", { width, height: Math.ceil(number / width), title: "units in order: coloured where kept" });
    const pen = canvas.getContext("2d");
    const probe = getComputedStyle(document.documentElement);
    const colour = [`--g${groups[k].colour % COLOURS}`, "--gone"].map((name) => probe.getPropertyValue(name).trim());
    for (let unit = 0; unit < number; unit++) {
      pen.fillStyle = colour[Model.isKept(k, unit) ? 0 : 1];
      pen.fillRect(unit % width, Math.floor(unit / width), 1, 1);
    }
    return canvas;
  }

  function unit(k, at) {
    const lines = Model.together(k, at).map(([axis, positions]) =>
      p(goes({ kind: "axis", at: axis }, axes[axis].name), positions === null ? soft(" irregular positions: ask explain()") : `[${Words.runs(positions)}]`));
    return [p(el("b", {}, `unit ${at} of ${groups[k].name}`), Model.isKept(k, at) ? (Model.changed ? ": kept" : "") : ": removed"), p(soft("All of this is removed together:")), ...lines];
  }

  function group(k, chosen) {
    const each = groups[k];
    const below = el("div", {}, ...(chosen === undefined ? [] : unit(k, chosen)));
    const field = el("input", { type: "number", min: 0, max: each.units - 1, "aria-label": "unit", style: "width:6em", onchange: (e) => {
      const at = Math.min(Math.max(0, Math.trunc(Number(e.target.value) || 0)), each.units - 1);
      below.replaceChildren(...unit(k, at));
    } });
    if (chosen !== undefined) field.value = chosen;
    const at = Model.home(k);
    return [
      el("h2", {}, chip(k), " ", each.name), p(share(k)), each.of > each.units ? p(soft(`${each.of - each.units} of ${each.of} units were removed before`)) : null, units(k),
      at >= 0 ? p(soft("made at "), goes({ kind: "layer", at }, boxes[at].title)) : null,
      p(soft(each.exact ? "masking it gives what removing it gives" : `masking it is not removing it: ${each.notes.join("; ")}`)),
      ...few(each.factors.map((text) => p(soft(`factor of ${text}`))), 4),
      each.scores.length ? p(soft("scores "), `${Words.short(each.scores[0])} to ${Words.short(each.scores[1])}`) : null,
      each.damage.length ? h3("damage: error of the output by units removed") : null, each.damage.length ? curve(k) : null,
      h3("one unit"), p("unit ", field, soft(` of ${each.units}: what is removed with it`)), below,
      h3(`${each.members.length} axes`), ...each.members.map(([axis]) => axisLine(axis)),
    ];
  }

  function axis(k, position) {
    const each = axes[k];
    const at = Model.boxOfAxis.get(k);
    const found = position === undefined ? [] : Model.unitsAt(k, position);
    return [
      el("h2", {}, position === undefined ? each.name : `${each.name}[${position}]`),
      at === undefined ? null : p(soft("in "), goes({ kind: "layer", at }, boxes[at].title)),
      ...found.flatMap(([group, at]) => [p(chip(group)), ...unit(group, at)]),
      position !== undefined && !found.length ? p("pinned: ", each.why.map((reason) => Model.reasons[reason]).join("; ") || "it is no unit's") : null,
      axisLine(k), h3("groups"), ...each.groups.map(groupLine),
    ];
  }

  const reason = (k) => [el("h2", {}, "pinned: ", Model.data.pinned[k][0]), ...Model.data.pinned[k][1].map(axisLine)];

  // -- charts and tables -------------------------------------------------------------------------------------------

  function curve(k) {
    const { damage, kept, of, units: number } = groups[k];
    const [w, h, left, low] = [380, 150, 46, 20];
    const top = Math.max(...damage.map((point) => point[1]), 1e-12);
    const x = (value) => left + (value / number) * (w - left - 8), y = (value) => h - low - (value / top) * (h - low - 10);
    const drawn = svg("svg", { viewBox: `0 0 ${w} ${h}`, class: `curve ${colourOf(k)}`, width: "100%", role: "img", "aria-label": `damage of ${groups[k].name}` });
    drawn.append(svg("line", { x1: left, y1: h - low, x2: w - 8, y2: h - low }), svg("line", { x1: left, y1: 8, x2: left, y2: h - low }));
    const text = (words, at, up, anchor) => drawn.append(svg("text", { x: at, y: up, "text-anchor": anchor }, document.createTextNode(words)));
    text("0", left - 4, h - low, "end"); text(Words.short(top), left - 4, 14, "end"); text("0", left, h - 5, "middle"); text(`${number} removed`, w - 8, h - 5, "end");
    if (kept < of) drawn.append(svg("line", { x1: x(of - kept), y1: 8, x2: x(of - kept), y2: h - low, "stroke-dasharray": "3 3" }));
    drawn.append(svg("path", { d: damage.map(([at, value], point) => `${point ? "L" : "M"}${x(at)} ${y(value)}`).join("") }));
    return drawn;
  }

  function table(heads, rows, sorted) {
    const body = el("tbody");
    const fill = () => body.replaceChildren(...rows.map((row) => el("tr", { class: row.what ? "link" : "", onclick: () => row.what && show(row.what) }, ...row.cells.map((cell) => el("td", { class: "num" }, cell.show)))));
    const sort = (column, up) => rows.sort((a, b) => { const [x, y] = [a.cells[column].by, b.cells[column].by]; return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1); });
    let [last, up] = [sorted, false];
    const head = heads.map((name, k) => el("th", {}, el("button", { title: "sort", onclick: () => { up = last === k ? !up : k === 0; last = k; sort(k, up); fill(); } }, name)));
    fill();
    return el("table", {}, el("thead", {}, el("tr", {}, ...head)), body);
  }
  const cell = (show, by = show) => ({ show, by });

  function legend() {
    const some = groups.some((each) => each.damage.length);
    const rows = groups.map((each, k) => ({ what: { kind: "group", at: k }, cells: [
      { show: el("span", { style: "white-space:normal" }, chip(k), " ", each.name, each.exact ? "" : " *"), by: k }, cell(String(each.of), each.of),
      ...(Model.changed ? [cell(`${each.kept} (${Words.share(each.kept, each.of)})`, each.kept / each.of)] : []), cell(String(each.members.length), each.members.length),
      ...(some ? [cell(each.damage.length ? Words.short(damageAt(each)) : "", each.damage.length ? damageAt(each) : -1)] : []),
    ] }));
    const heads = ["group", "units", ...(Model.changed ? ["kept"] : []), "axes", ...(some ? [Model.changed ? "damage" : "half removed"] : [])];
    const star = groups.some((each) => !each.exact) ? p(soft("* masking is not removing")) : null;
    return [p(soft("Units of a group touch the same axes. Click one to see it in the network.")), star, table(heads, rows, 0)];
  }

  const damageAt = (each) => {
    const wanted = Model.changed ? each.of - each.kept : each.units / 2;
    return each.damage.reduce((best, point) => (Math.abs(point[0] - wanted) < Math.abs(best[0] - wanted) ? point : best))[1];
  };

  function layers() {
    const timed = boxes.some((each) => each.seconds.length);
    const shown = boxes.map((each, k) => [each, k]).filter(([each]) => each.macs[0] || each.params[0] || (each.seconds[0] || 0) > 0);
    const last = (values) => values[Model.changed ? values.length - 1 : 0] || 0;
    const both = (values, unit) => cell(Model.changed && values.length > 1 ? `${Words.short(values[0], unit)} → ${Words.short(values[1], unit)}` : Words.short(values[0] || 0, unit), last(values));
    const rows = shown.map(([each, k]) => ({ what: { kind: "layer", at: k }, cells: [
      { show: el("span", { style: "white-space:normal" }, each.title), by: k }, both(each.macs, ""), both(each.params, ""), ...(timed ? [both(each.seconds, "s")] : []),
    ] }));
    return [p(soft("Click a heading to sort.")), table(["layer", "MACs", "parameters", ...(timed ? ["time"] : [])], rows, 0)];
  }

  function totals() {
    const rows = Model.data.totals.map(({ name, unit, values }) => [name, Words.short(values[0], unit), ...(Model.changed ? [Words.short(values[1], unit), Words.share(values[1], values[0])] : [])]);
    const heads = ["", ...(Model.changed ? ["before", "after", "left"] : ["network"])];
    const row = (tag, cells) => el("tr", {}, ...cells.map((text) => el(tag, { class: "num" }, text)));
    const facts = Model.data.facts.map(([name, text]) => p(soft(`${name} `), text));
    return [el("h2", {}, Model.data.title), el("table", { id: "totals" }, row("th", heads), ...rows.map((cells) => row("td", cells))),
      p(soft(`${count(boxes.length, "box").replace("boxs", "boxes")}, ${count(scopes.length, "module")}, ${count(groups.length, "group")}`)), ...facts,
      h3("how to read it"), p("A box is a layer with the norm and the activation after it. A box with a plus is a folded module: click it to unfold, click its caption to fold. Numbers in colour are groups: their units are removed together. A line has the colour of the group whose channels go through it; it is grey where several do, dotted where none does. Of a value that more than six boxes read, one line is drawn; the details of a box name all that it reads.")];
  }

  const pinned = () => [p(soft("Why axes are pinned, with the number of axes.")), table(["reason", "axes"], Model.data.pinned.map(([text, held], k) => ({ what: { kind: "reason", at: k }, cells: [{ show: el("span", { style: "white-space:normal" }, text), by: text }, cell(String(held.length), held.length)] })), 1),
    ...Model.data.unknown.map(([op, nodes]) => p(`no rule for ${op}, at ${nodes.slice(0, 4).join(", ")}${nodes.length > 4 ? " ..." : ""}: what it touches is pinned`))];

  const damages = () => groups.map((each, k) => [each, k]).filter(([each]) => each.damage.length).flatMap(([, k]) => [groupLine(k), curve(k)]);

  function plan() {
    const text = el("textarea", { readonly: "", spellcheck: "false", "aria-label": "plan as JSON" });
    text.value = Model.data.plan;
    const copy = el("button", { onclick: async () => {
      text.select();
      let done = false;
      try { await navigator.clipboard.writeText(text.value); done = true; } catch { done = document.execCommand("copy"); }
      copy.textContent = done ? "copied" : "selected: press Ctrl+C";
    } }, "copy");
    return [p("PrunePlan.from_json reads it. ", copy), text];
  }

  const tabs = [["overview", totals], ["groups", legend], ["layers", layers], ["pinned", pinned], ...(groups.some((each) => each.damage.length) ? [["damage", damages]] : []), ...(Model.data.plan ? [["plan", plan]] : [])];

  function tip(id) {
    const k = Number(id.slice(1));
    const members = id[0] === "s" ? Model.boxesIn(k) : [k];
    const held = Model.union(members, "touched");
    const fixed = Model.union(members, "axes").filter((axis) => axes[axis].pinned && / (out|both|in)$/.test(axes[axis].is));
    const name = id[0] === "s" ? scopes[k].title : boxes[k].title;
    return [
      el("b", {}, name), ...(id[0] === "s" ? [] : [shape(boxes[k])]), ...costs(members),
      ...few(held.map((group) => p(chip(group), " ", groups[group].name, " ", share(group))), 5),
      ...few(fixed.map((axis) => p(axes[axis].name, soft(` ${axes[axis].pinned} pinned: ${axes[axis].why.map((reason) => Model.reasons[reason]).join("; ")}`))), 2),
    ].filter(Boolean);
  }

  const clean = (parts) => parts.filter((part) => part !== null && part !== undefined);
  return { tabs, tip, box: (k) => clean(box(k)), scope: (...all) => clean(scope(...all)), group: (...all) => clean(group(...all)), axis: (...all) => clean(axis(...all)), reason: (k) => clean(reason(k)), clean, onShow: (handler) => (show = handler) };
})();
