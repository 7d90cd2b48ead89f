"use strict";
// Where everything stands. dagre lays out each unfolded module by itself: its children, and ports at its border for the values that
// come in and go out. An unfolded module is one node of the module around it, of the size that its own layout takes.

const Layout = (() => {
  const STRIP = 26, PAD = 14, GAP = 34, BETWEEN = 22, MANY = 300, FAN = 6;
  const cache = new Map();

  /** Edges of each unfolded scope, between its children ("b3", "s1") and its ports ("in:3", "out:3", by the box that made the value). */
  function local(open) {
    const found = new Map();
    const at = (scope) => found.get(scope) || found.set(scope, new Map()).get(scope);
    const put = (scope, from, to, value, groups) => {
      const apart = from[0] === "i" || to[0] === "o" || [from, to].some((id) => id[0] === "s" && open.has(Number(id.slice(1))));
      const key = `${from}|${to}|${apart ? value : ""}`;
      const known = at(scope).get(key) || at(scope).set(key, { from, to, value, groups: new Set() }).get(key);
      groups.forEach((group) => known.groups.add(group));
    };
    for (const [source, target, groups] of Model.edges) {
      // From the outside in: [the scope that holds it, what stands for the box there].
      const steps = (box) => {
        const path = Model.around(Model.boxes[box].scope).reverse();
        const result = [];
        let holder = -1;
        for (const scope of path) {
          result.push([holder, `s${scope}`]);
          if (!open.has(scope)) return result;
          holder = scope;
        }
        result.push([holder, `b${box}`]);
        return result;
      };
      const [from, to] = [steps(source), steps(target)];
      let k = 0;
      while (k < from.length && k < to.length && from[k][1] === to[k][1]) k++;
      if (k === from.length || k === to.length) continue; // both are inside one folded module
      put(from[k][0], from[k][1], to[k][1], source, groups);
      for (const [scope, child] of from.slice(k + 1)) put(scope, child, `out:${source}`, source, groups);
      for (const [scope, child] of to.slice(k + 1)) put(scope, `in:${source}`, child, source, groups);
    }
    for (const lines of found.values()) thin(lines);
    return found;
  }

  /** Of a value that many boxes read, such as the angles of rotary positions, only the line to the first is drawn. */
  function thin(lines) {
    const readers = new Map(), reads = new Map();
    for (const [key, line] of lines) {
      const source = `${line.from}|${line.value}`;
      readers.set(source, [...(readers.get(source) || []), key]);
      reads.set(line.to, (reads.get(line.to) || 0) + 1);
    }
    for (const keys of readers.values())
      for (const key of keys.length > FAN ? keys.slice(1) : []) {
        const { to } = lines.get(key);
        if (reads.get(to) > 1) {
          lines.delete(key);
          reads.set(to, reads.get(to) - 1);
        }
      }
  }

  /** The children of a scope and the lines between them, at places relative to its upper left corner. */
  function placed(scope, open, edges, sizes, turned) {
    const inner = [...open].filter((k) => scope < 0 || Model.around(k).includes(scope)).sort((a, b) => a - b).join();
    const key = `${scope}/${turned}/${inner}`;
    if (cache.has(key)) return cache.get(key);
    const made = arranged(scope, open, edges, sizes, turned);
    cache.set(key, made);
    return made;
  }

  function arranged(scope, open, edges, sizes, turned) {
    const { boxes, scopes } = Model.children(scope);
    const lines = [...(edges.get(scope) || new Map()).values()];
    const graph = new dagre.graphlib.Graph({ multigraph: true });
    const ranker = boxes.length + scopes.length > MANY ? "longest-path" : "network-simplex";
    graph.setGraph({ rankdir: turned ? "LR" : "TB", nodesep: BETWEEN, ranksep: GAP, edgesep: 12, ranker });
    const nested = new Map();
    const order = [...boxes.map((k) => [k, `b${k}`]), ...scopes.map((k) => [Model.boxesIn(k)[0], `s${k}`])].sort((a, b) => a[0] - b[0]);
    for (const [, id] of order) {
      const k = Number(id.slice(1));
      if (id[0] === "s" && open.has(k)) {
        nested.set(id, placed(k, open, edges, sizes, turned));
        graph.setNode(id, { width: nested.get(id).width, height: nested.get(id).height });
      } else graph.setNode(id, { ...sizes(id) });
    }
    const ports = new Set(lines.flatMap((line) => [line.from, line.to]).filter((id) => id.includes(":")));
    for (const port of ports) {
      graph.setNode(port, { width: 1, height: 1 });
      // All ports of one side are on one rank, at the border.
      const end = port[0] === "i" ? "before" : "after";
      graph.setNode(end, { width: 1, height: 1 });
      graph.setEdge(port[0] === "i" ? end : port, port[0] === "i" ? port : end, { weight: 8, minlen: 1 }, "border");
    }
    // What reads nothing, or is read by nothing, stays between them all the same.
    const ends = [["before", "to", (id) => ["before", id]], ["after", "from", (id) => [id, "after"]]];
    for (const [end, side, between] of ends)
      for (const [, id] of graph.hasNode(end) ? order : [])
        if (!lines.some((line) => line[side] === id)) graph.setEdge(...between(id), { weight: 0, minlen: 2 }, "border");
    lines.forEach((line, k) => graph.setEdge(line.from, line.to, { weight: line.groups.size ? 3 : 1 }, String(k)));
    dagre.layout(graph);
    return framed(scope, graph, lines, ports, nested, order.map((pair) => pair[1]), turned);
  }

  /** Moves what dagre has placed into a frame with a caption, and lines to the ports of the frames in it. */
  function framed(scope, graph, lines, ports, nested, ids, turned) {
    const node = (id) => graph.node(id);
    const along = turned ? "x" : "y";
    const extent = (side, which) => ids.map((id) => node(id)[side] + (which * node(id)[side === "x" ? "width" : "height"]) / 2);
    const low = (side) => Math.min(...extent(side, -1)), high = (side) => Math.max(...extent(side, 1));
    const entries = [...ports].filter((id) => id[0] === "i"), exits = [...ports].filter((id) => id[0] === "o");
    const points = graph.edges().filter((e) => e.name !== "border").flatMap((e) => graph.edge(e).points);
    const first = (side) => Math.min(low(side), ...points.map((p) => p[side])), last = (side) => Math.max(high(side), ...points.map((p) => p[side]));
    const whole = scope < 0;
    const caption = whole ? 0 : captionWidth(scope);
    const start = entries.length ? node(entries[0])[along] : low(along) - 10;
    const end = exits.length ? node(exits[0])[along] : high(along) + 12;
    const shift = { x: PAD - first("x"), y: PAD - first("y") };
    shift[along] = (turned || whole ? 0 : STRIP) - (entries.length ? start : low(along) - 10);
    let width, height;
    if (turned) {
      if (!whole) shift.y = STRIP + 8 - first("y");
      [width, height] = [Math.max(end + shift.x, caption + 12), last("y") + shift.y + PAD];
    } else {
      // Lines enter at the top: to the right of the caption.
      const leftmost = Math.min(Infinity, ...entries.map((id) => node(id).x));
      if (Number.isFinite(leftmost)) shift.x = Math.max(shift.x, caption + 16 - leftmost);
      [width, height] = [Math.max(last("x") + shift.x + PAD, caption + 12), end + shift.y];
    }
    const moved = (p) => ({ x: p.x + shift.x, y: p.y + shift.y });
    const items = ids.map((id) => {
      const { x, y, width: w, height: h } = node(id);
      return { id, x: x - w / 2 + shift.x, y: y - h / 2 + shift.y, width: w, height: h, inner: nested.get(id) || null };
    });
    const byId = new Map(items.map((item) => [item.id, item]));
    const drawn = lines.map((line, k) => {
      const inner = graph.edge(line.from, line.to, String(k)).points.map(moved).slice(1, -1);
      const anchor = (id, way) => {
        if (id.includes(":")) return moved(node(id));
        const item = byId.get(id), port = item.inner && item.inner.ports.get(`${way}:${line.value}`);
        return port ? { x: port.x + item.x, y: port.y + item.y } : null;
      };
      const [from, to] = [anchor(line.from, "out"), anchor(line.to, "in")];
      const path = ends(from, to, byId.get(line.from), byId.get(line.to), inner, turned);
      if (line.from.includes(":")) path.unshift(border(path[0], false));
      const exit = line.to.includes(":") ? border(path[path.length - 1], true) : null;
      return { d: route(path, line.from.includes(":"), turned, exit), groups: [...line.groups].sort((a, b) => a - b), arrow: !exit && !to };
    });
    function border(p, far) {
      return turned ? { x: far ? width : 0, y: p.y } : { x: p.x, y: far ? height : 0 };
    }
    const places = new Map([...entries.map((id) => [id, border(moved(node(id)), false)]), ...exits.map((id) => [id, border(moved(node(id)), true)])]);
    return { scope, width, height, items, lines: drawn, ports: places };
  }

  /** The points of a line: where it leaves, those between, where it arrives. Boxes are left at the foot and entered at the top. */
  function ends(from, to, source, target, inner, turned) {
    const [along, across, length, breadth] = turned ? ["x", "y", "width", "height"] : ["y", "x", "height", "width"];
    const middle = (item) => item[across] + item[breadth] / 2;
    const near = (item, wanted) => Math.min(Math.max(wanted, middle(item) - 0.3 * item[breadth]), middle(item) + 0.3 * item[breadth]);
    const at = (u, v) => (turned ? { x: v, y: u } : { x: u, y: v });
    const next = inner.length > 2 ? inner[1][across] : to ? to[across] : middle(target);
    const start = from || at(near(source, next), source[along] + source[length]);
    const last = inner.length > 2 ? inner[inner.length - 2][across] : start[across];
    return [start, ...inner, to || at(near(target, last), target[along])];
  }

  /** Straight past the boxes of each rank, and across in the gap between two ranks, where dagre has put every other point. */
  function route(points, entered, turned, exit) {
    const [along, across] = turned ? ["x", "y"] : ["y", "x"];
    const at = (u, v) => (turned ? `${v} ${u}` : `${u} ${v}`);
    const path = entered ? points.slice(1) : points;
    let text = entered ? `M${at(points[0][across], points[0][along])}L${at(path[0][across], path[0][along])}` : `M${at(path[0][across], path[0][along])}`;
    for (let k = 1; k < path.length; k += 2) {
      const [before, gap, after] = [path[k - 1], path[k], path[k + 1] || path[k]];
      const [low, high, v] = [gap[along] - GAP / 2 + 1, gap[along] + GAP / 2 - 1, gap[along]];
      text += `L${at(before[across], low)}C${at(before[across], v)} ${at(after[across], v)} ${at(after[across], high)}L${at(after[across], after[along])}`;
    }
    return exit ? `${text}L${at(exit[across], exit[along])}` : text;
  }

  const ruler = document.createElement("canvas").getContext("2d");
  function textWidth(text, bold, size = 12) {
    ruler.font = `${bold ? 650 : 400} ${size}px system-ui, "DejaVu Sans", sans-serif`;
    return ruler.measureText(text).width;
  }
  /** A name without that of the module around it, unless what is left would only be numbers. */
  function relative(title, around) {
    const scope = Model.around(around).map((k) => Model.scopes[k].title).find((each) => title.startsWith(`${each}.`));
    const rest = scope ? title.slice(scope.length + 1) : title;
    return Words.clip(/^[\d.]*$/.test(rest) ? title : rest, 32);
  }
  const captionText = (scope) => relative(Model.scopes[scope].title, Model.scopes[scope].parent);
  const captionWidth = (scope) => textWidth(`− ${captionText(scope)}`, true) + 18;

  /** Everything that is seen, at its place in the picture. */
  function layout(open, sizes, turned) {
    const root = placed(-1, open, local(open), sizes, turned);
    const result = { width: root.width + PAD, height: root.height + PAD, boxes: [], frames: [], lines: [] };
    (function unpack(one, x, y, depth) {
      for (const line of one.lines) result.lines.push({ ...line, x, y });
      for (const item of one.items) {
        const at = { x: item.x + x, y: item.y + y, width: item.width, height: item.height, index: Number(item.id.slice(1)) };
        if (item.inner) {
          result.frames.push({ ...at, depth });
          unpack(item.inner, at.x, at.y, depth + 1);
        } else result.boxes.push({ ...at, module: item.id[0] === "s" });
      }
    })(root, 0, PAD, 0);
    return result;
  }

  return { layout, relative, textWidth, captionText, captionWidth, STRIP };
})();
