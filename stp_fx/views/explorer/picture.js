"use strict";
// The network as SVG. All names go in as text nodes.

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) name.startsWith("on") ? made.addEventListener(name.slice(2), value) : made.setAttribute(name, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children.filter(Boolean));
  return made;
}

const COLOURS = 10;
const colourOf = (group) => `c${Model.groups[group].colour % COLOURS}${Model.groups[group].colour >= COLOURS ? " again" : ""}`;
const chip = (group) => el("span", { class: `chip ${colourOf(group)}`, title: Model.groups[group].name }, String(group + 1));

const Picture = (() => {
  const LINE = 17, SIDE = 8, CHIP = 24, FEW = 6;

  /** The lines of text of a box, and its size. */
  const known = new Map();
  function content(id) {
    if (known.has(id)) return known.get(id);
    const k = Number(id.slice(1)), module = id[0] === "s";
    const members = module ? Model.boxesIn(k) : [k];
    const last = Model.boxes[members[members.length - 1]];
    const touched = Model.union(members, "touched");
    const carried = last.carried.length ? last.carried : [];
    const title = module ? `+ ${Layout.captionText(k)}` : Layout.relative(Model.boxes[k].title, Model.boxes[k].scope);
    const kind = module ? `${Model.scopes[k].class || "module"}, ${members.length} boxes` : Words.cut(last.calls.join(", "), 38);
    // A folded module shows all its groups, a box the one that its result has; the name is that of the result's group.
    const chips = (module ? touched : carried.slice(0, 1)).slice(0, FEW);
    const rest = (module ? touched : carried).length - chips.length;
    const main = carried.length ? Model.groups[carried[0]] : null;
    const share = main ? ` (${Model.changed ? `${main.kept}/` : ""}${main.of})` : "";
    const around = module ? Model.scopes[k].parent : Model.boxes[k].scope;
    const name = main ? Words.clip(Layout.relative(main.short, around), 24) + share : "";
    const more = rest > 0 ? `+${rest}` : "";
    const chipsWidth = chips.length * (CHIP + 3) + (more ? Layout.textWidth(more, false, 11) + 8 : 0);
    const wide = module && chips.length > 1;
    const lines = [title, kind].filter(Boolean);
    const rows = lines.length + (chips.length ? 1 : 0) + (wide && name ? 1 : 0);
    const width = Math.max(
      Layout.textWidth(title, true), Layout.textWidth(kind, false, 11),
      chipsWidth + (wide ? 0 : Layout.textWidth(name, false, 11) + 4), wide ? Layout.textWidth(`gives ${name}`, false, 11) : 0, 56,
    );
    const size = { width: Math.ceil(width) + SIDE + 18, height: rows * LINE + 12 + (bar(members) ? 6 : 0) };
    known.set(id, { k, module, members, title, kind, chips, more, chipsWidth, name, wide, main: carried[0], ...size });
    return known.get(id);
  }

  /** The share of the MACs (or else of the parameters) that is left; null where nothing changes. */
  function bar(members) {
    if (!Model.changed) return null;
    const [before, after] = [Model.sum(members, "macs"), Model.sum(members, "params")].find((pair) => pair[0] > 0) || [0, 0];
    return before ? { left: after / before } : null;
  }

  function boxOf(item) {
    const c = content(`${item.module ? "s" : "b"}${item.index}`);
    const { width, height } = item;
    const group = svg("g", { class: `box${item.module ? " module" : ""}`, transform: `translate(${item.x} ${item.y})`, tabindex: 0, role: "button" });
    group.dataset.id = `${item.module ? "s" : "b"}${item.index}`;
    group.setAttribute("aria-label", `${c.module ? "module" : "layer"} ${c.module ? Model.scopes[c.k].title : Model.boxes[c.k].title}, ${c.kind}`);
    if (item.module) {
      group.setAttribute("aria-expanded", "false");
      group.append(svg("rect", { class: "under", x: 4, y: 4, width, height, rx: 5 }));
    }
    group.append(svg("rect", { class: "body", width, height, rx: 5 }));
    group.append(svg("rect", { class: `side ${c.main === undefined ? "" : colourOf(c.main)}`, x: 1, y: 1, width: SIDE - 2, height: height - 2, rx: 3 }));
    let y = LINE + 2;
    const text = (words, name, x = SIDE + 7) => group.append(svg("text", { x, y, class: name }, document.createTextNode(words)));
    text(c.title, "name");
    y += LINE;
    text(c.kind, "small");
    if (c.chips.length) {
      y += LINE;
      c.chips.forEach((k, at) => {
        const x = SIDE + 7 + at * (CHIP + 3);
        group.append(svg("rect", { class: `chipbox ${colourOf(k)}`, x, y: y - 12, width: CHIP, height: 15, rx: 4 }));
        group.append(svg("text", { class: "number", x: x + CHIP / 2, y: y - 0.5 }, document.createTextNode(String(k + 1))));
      });
      if (c.more) text(c.more, "small", SIDE + 9 + c.chips.length * (CHIP + 3));
      if (c.wide && c.name) {
        y += LINE;
        text(`gives ${c.name}`, "small");
      } else if (c.name) text(c.name, "small", SIDE + 9 + c.chipsWidth);
    }
    const left = bar(c.members);
    if (left) {
      const [x, w] = [SIDE + 7, width - SIDE - 16];
      group.append(svg("rect", { class: "left", x, y: height - 9, width: w, height: 4, rx: 2 }));
      group.append(svg("rect", { class: `share ${c.main === undefined ? "" : colourOf(c.main)}`, x, y: height - 9, width: Math.max(0, w * Math.min(1, left.left)), height: 4, rx: 2 }));
    }
    return group;
  }

  function captionOf(frame) {
    const width = Layout.captionWidth(frame.index);
    const group = svg("g", { class: "caption", transform: `translate(${frame.x + 5} ${frame.y + 4})`, tabindex: 0, role: "button", "aria-expanded": "true" });
    group.dataset.id = `s${frame.index}`;
    group.setAttribute("aria-label", `fold module ${Model.scopes[frame.index].title}`);
    group.append(svg("rect", { width, height: 20, rx: 5 }));
    group.append(svg("text", { x: 7, y: 14, class: "name" }, document.createTextNode(`− ${Layout.captionText(frame.index)}`)));
    return group;
  }

  function lineOf(line) {
    const [group] = line.groups;
    const look = line.groups.length === 1 ? colourOf(group) : line.groups.length ? "" : "none";
    const drawn = svg("path", { class: `edge ${look}`, d: line.d, transform: `translate(${line.x} ${line.y})` });
    if (line.arrow) drawn.setAttribute("marker-end", "url(#arrow)");
    drawn.dataset.groups = line.groups.join(" ");
    return drawn;
  }

  function draw(open, turned) {
    const found = Layout.layout(open, (id) => ({ width: content(id).width, height: content(id).height }), turned);
    const picture = svg("svg", { viewBox: `0 0 ${found.width} ${found.height}`, role: "group" });
    picture.append(svg("defs", {}, svg("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto", markerUnits: "userSpaceOnUse" }, svg("path", { d: "M0 0L8 4L0 8z" }))));
    for (const { x, y, width, height, depth } of found.frames)
      picture.append(svg("g", { class: `frame${depth % 2 ? " odd" : ""}` }, svg("rect", { x, y, width, height, rx: 8 })));
    found.lines.forEach((line) => picture.append(lineOf(line)));
    found.boxes.forEach((item) => picture.append(boxOf(item)));
    found.frames.forEach((frame) => picture.append(captionOf(frame)));
    return { picture, width: found.width, height: found.height };
  }

  /** What stands for one group in the picture is made bold, all else pale; null: everything as usual. */
  function choose(picture, group) {
    picture.classList.toggle("choosing", group !== null);
    for (const each of picture.querySelectorAll(".box, .caption")) {
      const k = Number(each.dataset.id.slice(1));
      const members = each.dataset.id[0] === "s" ? Model.boxesIn(k) : [k];
      each.classList.toggle("hit", group !== null && members.some((box) => Model.boxes[box].touched.includes(group)));
    }
    for (const each of picture.querySelectorAll(".edge"))
      each.classList.toggle("hit", group !== null && each.dataset.groups.split(" ").includes(String(group)));
  }

  return { draw, choose };
})();
