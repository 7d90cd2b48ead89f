"use strict";
// The data of the page, and questions about them. Boxes, scopes, groups and axes are named by their index.

const Model = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { boxes, scopes, groups, axes, maps, edges, reasons } = data;
  const changed = groups.some((group) => group.kept < group.of);

  const inside = scopes.map(() => ({ boxes: [], scopes: [] }));
  const top = { boxes: [], scopes: [] };
  boxes.forEach((box, k) => (box.scope < 0 ? top : inside[box.scope]).boxes.push(k));
  scopes.forEach((scope, k) => (scope.parent < 0 ? top : inside[scope.parent]).scopes.push(k));
  const children = (scope) => (scope < 0 ? top : inside[scope]);

  const all = new Map();
  function boxesIn(scope) {
    if (!all.has(scope)) all.set(scope, children(scope).scopes.reduce((known, k) => known.concat(boxesIn(k)), children(scope).boxes.slice()));
    return all.get(scope);
  }

  /** The scopes around a scope and itself, innermost first. */
  function around(scope) {
    const found = [];
    for (; scope >= 0; scope = scopes[scope].parent) found.push(scope);
    return found;
  }

  function sum(members, field) {
    const length = Math.max(0, ...members.map((k) => boxes[k][field].length));
    return Array.from({ length }, (_, at) => members.reduce((total, k) => total + (boxes[k][field][at] || 0), 0));
  }

  const union = (members, field) => [...new Set(members.flatMap((k) => boxes[k][field]))].sort((a, b) => a - b);

  // -- units and positions: maps hold runs [position, count, unit, step] ---------------------------------------------

  function* positions(map, unit) {
    for (const [at, count, first, step] of maps[map] || []) {
      if (step === 0) {
        if (unit === first) for (let k = 0; k < count; k++) yield at + k;
      } else {
        const k = (unit - first) / step;
        if (Number.isInteger(k) && k >= 0 && k < count) yield at + k;
      }
    }
  }

  /** [group, unit] of a position along an axis; several for a position of a product. */
  function unitsAt(axis, position) {
    const found = [];
    for (const k of axes[axis].groups)
      for (const [member, map] of groups[k].members)
        if (member === axis)
          for (const [at, count, first, step] of maps[map] || [])
            if (position >= at && position < at + count) found.push([k, first + step * (position - at)]);
    return found;
  }

  /** [axis, positions] of everything that is removed with a unit; positions are null where the page does not hold them. */
  const together = (group, unit) =>
    groups[group].members.map(([axis, map]) => [axis, maps[map] ? [...positions(map, unit)] : null]);

  const bits = groups.map((group) => (group.left === null ? null : Uint8Array.from(atob(group.left), (c) => c.charCodeAt(0))));
  const isKept = (group, unit) => bits[group] === null || Boolean((bits[group][unit >> 3] >> (7 - (unit & 7))) & 1);

  const boxOfAxis = new Map();
  boxes.forEach((box, k) => box.axes.forEach((axis) => boxOfAxis.has(axis) || boxOfAxis.set(axis, k)));
  /** The box that a group is named for; or else the first whose result has its channels. */
  const home = (group) => {
    const named = groups[group].members.find(([axis]) => axes[axis].name === groups[group].name);
    if (named && boxOfAxis.has(named[0])) return boxOfAxis.get(named[0]);
    const carrying = boxes.findIndex((box) => box.carried.includes(group));
    return carrying >= 0 ? carrying : boxes.findIndex((box) => box.touched.includes(group));
  };

  // -- search ------------------------------------------------------------------------------------------------------

  const entries = [
    ...groups.map((group, k) => ({ kind: "group", at: k, text: group.name, more: `${k + 1}, ${group.units} units` })),
    ...scopes.map((scope, k) => ({ kind: "module", at: k, text: scope.title, more: scope.class })),
    ...boxes.map((box, k) => ({ kind: "layer", at: k, text: box.title, more: box.calls.join(", "), also: box.nodes.join(" ") })),
    ...axes.map((axis, k) => ({ kind: "axis", at: k, text: axis.name, more: axis.pinned ? `${axis.pinned} of ${axis.size} pinned` : `${axis.size} positions` })),
    ...data.pinned.map(([reason, held], k) => ({ kind: "reason", at: k, text: reason, more: `pins ${held.length} axes` })),
  ].map((entry) => ({ ...entry, key: `${entry.text} ${entry.more} ${entry.also || ""}`.toLowerCase() }));

  function channel(query) {
    const match = /^(.+?)\s*(?:\[\s*(\d+)\s*\]|\s(\d+))$/.exec(query.trim());
    if (!match) return [];
    const [name, position] = [match[1].trim(), Number(match[2] ?? match[3])];
    const outputs = (axis) => / (out|both)$/.test(axis.is);
    const named = axes.map((axis, k) => k).filter((k) => axes[k].name === name || axes[k].name.replace(/:\d+$/, "") === name);
    const of = axes.map((axis, k) => k).filter((k) => axes[k].name.replace(/\.[^.]*:\d+$/, "") === name);
    const found = named.length ? named : of;
    const best = found.filter((k) => outputs(axes[k]));
    const unit = groups.findIndex((group) => group.name === name || group.short === name);
    const listed = (best.length ? best : found).filter((k) => position < axes[k].size).slice(0, 4);
    const result = listed.map((axis) => ({ kind: "channel", at: axis, position, text: `${axes[axis].name}[${position}]`, more: "what goes with it" }));
    if (!result.length && unit >= 0 && position < groups[unit].units)
      result.push({ kind: "group", at: unit, position, text: `${groups[unit].name}`, more: `unit ${position}` });
    return result;
  }

  function search(query) {
    const words = query.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return [];
    const whole = words.join(" ");
    const found = entries.filter((entry) => words.every((word) => entry.key.includes(word)));
    const rank = (entry) => (entry.text.toLowerCase() === whole ? 0 : entry.text.toLowerCase().startsWith(whole) ? 1 : 2);
    return [...channel(query), ...found.map((entry) => [rank(entry), entry]).sort((a, b) => a[0] - b[0]).map((pair) => pair[1])];
  }

  return { data, boxes, scopes, groups, axes, edges, reasons, changed, children, boxesIn, around, sum, union, unitsAt, together, isKept, boxOfAxis, home, search };
})();

// -- words -----------------------------------------------------------------------------------------------------------

const Words = {
  /** 1,234,567 as 1.23 M; small whole numbers as they are. */
  short(value, unit = "") {
    if (value === null || value === undefined) return "";
    const scales = unit === "s" ? [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]] : [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];
    const known = unit === "s" ? "" : unit;
    for (const [size, letter] of scales) if (Math.abs(value) >= size) return `${Number((value / size).toPrecision(3))} ${letter}${known}`;
    return `${Number(value.toPrecision(3))}${known ? ` ${known}` : ""}`;
  },
  full: (value) => value.toLocaleString("en-US"),
  share: (after, before) => (before ? `${Math.round((1000 * after) / before) / 10} %` : ""),
  /** Indices, with runs of three or more as first and last. */
  runs(indices, limit = 8) {
    const parts = [];
    for (let k = 0; k < indices.length; ) {
      let last = k;
      while (last + 1 < indices.length && indices[last + 1] === indices[last] + 1) last++;
      if (last - k > 1) parts.push(`${indices[k]} to ${indices[last]}`);
      else for (let at = k; at <= last; at++) parts.push(String(indices[at]));
      k = last + 1;
    }
    return parts.slice(0, limit).join(", ") + (parts.length > limit ? ` and ${parts.length - limit} more` : "");
  },
  clip: (text, length) => (text.length <= length ? text : `…${text.slice(1 - length)}`),
  cut: (text, length) => (text.length <= length ? text : `${text.slice(0, length - 1)}…`),
  size: (shape) => (shape.length ? shape.join(" × ") : "a number"),
};
