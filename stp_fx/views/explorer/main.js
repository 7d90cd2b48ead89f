"use strict";
// What is open, what is selected, and what keys and clicks do.

(() => {
  const byId = (id) => document.getElementById(id);
  const [graph, panel, tip, search, found] = ["graph", "panel", "tip", "search", "found"].map(byId);
  const ROOM = 24, FEW = 8, MORE = 90, MANY = 400;
  const state = { open: new Set(), turned: false, zoom: 1, group: null, picked: null, tab: "overview" };
  let drawn = null;

  // -- the picture -------------------------------------------------------------------------------------------------

  /** Unfolds all modules of one depth after the other, as long as a screen has room; one more, where there would be next to nothing. */
  function start() {
    let level = Model.children(-1).scopes, seen = Model.children(-1).boxes.length + level.length;
    while (level.length) {
      const next = level.reduce((total, k) => total + Model.children(k).boxes.length + Model.children(k).scopes.length - 1, seen);
      if (next > (seen <= FEW ? MORE : ROOM)) break;
      level.forEach((k) => state.open.add(k));
      seen = next;
      level = level.flatMap((k) => Model.children(k).scopes);
    }
  }

  function draw(keep) {
    const before = keep && graph.querySelector(`[data-id="${keep}"]`)?.getBoundingClientRect();
    drawn = Picture.draw(state.open, state.turned);
    graph.replaceChildren(drawn.picture);
    size();
    mark();
    const after = keep && graph.querySelector(`[data-id="${keep}"]`);
    if (before && after) {
      const now = after.getBoundingClientRect();
      graph.scrollBy(now.left - before.left, now.top - before.top);
      after.focus({ preventScroll: true });
    }
  }

  function size() {
    drawn.picture.setAttribute("width", drawn.width * state.zoom);
    drawn.picture.setAttribute("height", drawn.height * state.zoom);
  }

  function zoom(factor) {
    const old = state.zoom;
    state.zoom = Math.min(3, Math.max(0.08, old * factor));
    const [x, y] = [graph.scrollLeft + graph.clientWidth / 2, graph.scrollTop + graph.clientHeight / 2].map((at) => (at * state.zoom) / old);
    size();
    graph.scrollTo(x - graph.clientWidth / 2, y - graph.clientHeight / 2);
  }

  function fit() {
    const [width, height] = [graph.clientWidth - 28, graph.clientHeight - 28];
    state.zoom = Math.min(1, Math.max(0.25, state.turned ? height / drawn.height : width / drawn.width));
    size();
  }

  function mark() {
    Picture.choose(drawn.picture, state.group);
    for (const each of drawn.picture.querySelectorAll(".picked")) each.classList.remove("picked");
    if (state.picked) drawn.picture.querySelector(`[data-id="${state.picked}"]`)?.classList.add("picked");
  }

  function toggle(scope) {
    if (state.open.has(scope)) {
      Model.children(scope).scopes.forEach(function close(k) { state.open.delete(k); Model.children(k).scopes.forEach(close); });
      state.open.delete(scope);
    } else state.open.add(scope);
    draw(`s${scope}`);
  }

  /** Unfolds what is around a box or a scope, and brings it into view. */
  function reveal(id) {
    const k = Number(id.slice(1));
    const around = Model.around(id[0] === "b" ? Model.boxes[k].scope : Model.scopes[k].parent);
    const closed = around.filter((scope) => !state.open.has(scope));
    closed.forEach((scope) => state.open.add(scope));
    if (closed.length) draw();
    graph.querySelector(`[data-id="${id}"]`)?.scrollIntoView({ block: "center", inline: "center" });
  }

  // -- selection ---------------------------------------------------------------------------------------------------

  function tabs(active) {
    const bar = [...Panels.tabs.map(([name]) => name), ...(active === "details" ? ["details"] : [])];
    byId("tabs").replaceChildren(...bar.map((name) => el("button", { role: "tab", "aria-selected": String(name === active), onclick: () => name === "details" || openTab(name) }, name)));
  }

  function openTab(name) {
    state.tab = name;
    tabs(name);
    panel.replaceChildren(...Panels.clean(Panels.tabs.find((tab) => tab[0] === name)[1]()));
    panel.scrollTop = 0;
  }

  function details(parts) {
    tabs("details");
    panel.replaceChildren(...parts);
    panel.scrollTop = 0;
  }

  /** Selects a layer, module, group, axis, channel or reason: details at the side, and its place in the picture. */
  function show({ kind, at, position }, quiet = false) {
    state.group = null;
    state.picked = null;
    if (kind === "layer") { state.picked = `b${at}`; details(Panels.box(at)); }
    if (kind === "module") { state.picked = `s${at}`; details(Panels.scope(at, state.open.has(at), () => { toggle(at); show({ kind, at }, true); })); }
    if (kind === "group") { state.group = at; details(Panels.group(at, position)); }
    if (kind === "axis" || kind === "channel") {
      details(Panels.axis(at, position));
      const box = Model.boxOfAxis.get(at);
      const held = position === undefined ? Model.axes[at].groups : Model.unitsAt(at, position).map((pair) => pair[0]);
      state.group = held.length ? held[0] : null;
      if (box !== undefined) state.picked = `b${box}`;
    }
    if (kind === "reason") details(Panels.reason(at));
    if (!quiet && state.picked) reveal(state.picked);
    mark();
    if (kind === "group" && !quiet) {
      const hits = [...drawn.picture.querySelectorAll(".box.hit")];
      const seen = graph.getBoundingClientRect();
      const inView = hits.some((each) => { const r = each.getBoundingClientRect(); return r.bottom > seen.top && r.top < seen.bottom; });
      if (hits.length && !inView) hits[0].scrollIntoView({ block: "center", inline: "center" });
    }
  }

  function clear() {
    state.group = state.picked = null;
    mark();
    openTab(state.tab);
  }

  function press(id) {
    const k = Number(id.slice(1));
    if (id[0] === "b") return show({ kind: "layer", at: k }, true);
    toggle(k);
    show({ kind: "module", at: k }, true);
  }

  // -- search ------------------------------------------------------------------------------------------------------

  const LIMIT = 40;
  let results = [], chosen = 0;

  function list() {
    const all = Model.search(search.value);
    results = all.slice(0, LIMIT);
    chosen = 0;
    const lines = results.map((entry, k) => el("li", { role: "option", id: `result${k}`, onmousedown: (e) => { e.preventDefault(); take(k); } }, entry.text, el("small", {}, `${entry.kind}${entry.more ? `, ${entry.more}` : ""}`)));
    if (all.length > LIMIT) lines.push(el("li", {}, el("small", {}, `and ${all.length - LIMIT} more`)));
    if (search.value.trim() && !all.length) lines.push(el("li", {}, el("small", {}, "nothing found")));
    found.replaceChildren(...lines);
    found.hidden = !lines.length;
    search.setAttribute("aria-expanded", String(!found.hidden));
    highlight();
  }

  function highlight() {
    [...found.children].forEach((line, k) => line.setAttribute("aria-selected", String(k === chosen && k < results.length)));
    search.setAttribute("aria-activedescendant", results.length ? `result${chosen}` : "");
    found.children[chosen]?.scrollIntoView({ block: "nearest" });
  }

  function take(k) {
    if (!results[k]) return;
    show(results[k]);
    found.hidden = true;
    search.setAttribute("aria-expanded", "false");
  }

  search.addEventListener("input", list);
  search.addEventListener("blur", () => (found.hidden = true));
  search.addEventListener("keydown", (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && results.length) { event.preventDefault(); chosen = (chosen + step + results.length) % results.length; highlight(); }
    if (event.key === "Enter") take(chosen);
    if (event.key === "Escape") { search.value = ""; list(); graph.focus(); clear(); }
    event.stopPropagation();
  });

  // -- mouse and keys ----------------------------------------------------------------------------------------------

  const target = (event) => event.target.closest?.("[data-id]");
  graph.addEventListener("click", (event) => { const on = target(event); on ? press(on.dataset.id) : clear(); });
  graph.addEventListener("keydown", (event) => {
    const on = target(event);
    if (on && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); press(on.dataset.id); }
  });
  function hint(on, x, y) {
    tip.hidden = !on;
    if (!on) return;
    tip.replaceChildren(...Panels.tip(on.dataset.id));
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(4, y + 14 + tip.offsetHeight > innerHeight ? y - tip.offsetHeight - 10 : y + 14)}px`;
  }
  graph.addEventListener("mousemove", (event) => hint(target(event), event.clientX, event.clientY));
  graph.addEventListener("mouseleave", () => hint(null));
  graph.addEventListener("focusin", (event) => { const on = target(event); if (on?.matches(":focus-visible")) { const r = on.getBoundingClientRect(); hint(on, r.right, r.top); } });
  graph.addEventListener("focusout", () => hint(null));
  graph.addEventListener("wheel", (event) => { if (event.ctrlKey) { event.preventDefault(); zoom(Math.exp(-event.deltaY / 300)); } }, { passive: false });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|TEXTAREA)$/.test(event.target.tagName)) return;
    const does = { "/": () => search.focus(), "+": () => zoom(1.25), "-": () => zoom(0.8), 0: fit, Escape: clear }[event.key];
    if (does) { event.preventDefault(); does(); }
  });
  byId("fold").onclick = () => { state.open.clear(); draw(); fit(); };
  byId("unfold").onclick = () => {
    if (Model.boxes.length > MANY && !confirm(`Unfold all ${Model.boxes.length} boxes? It takes a while.`)) return;
    Model.scopes.forEach((_, k) => state.open.add(k));
    draw();
  };
  byId("turn").onclick = () => { state.turned = !state.turned; draw(); fit(); };
  byId("in").onclick = () => zoom(1.25);
  byId("out").onclick = () => zoom(0.8);
  byId("fit").onclick = fit;
  byId("theme").onclick = () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");

  function theme(name) {
    document.documentElement.dataset.theme = name;
  }

  /** #open=layer1,layer1.0&find=conv1&tab=groups&theme=dark&turn=1: a page in a given state, for links and pictures. */
  function follow() {
    const asked = new URLSearchParams(location.hash.slice(1));
    theme(asked.get("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
    state.turned = asked.get("turn") === "1";
    if (asked.has("open")) {
      const names = asked.get("open").split(",");
      state.open = new Set(Model.scopes.map((_, k) => k).filter((k) => names.includes(Model.scopes[k].title)));
      [...state.open].forEach((k) => Model.around(k).forEach((each) => state.open.add(each)));
    } else start();
    draw();
    fit();
    openTab(Panels.tabs.some(([name]) => name === asked.get("tab")) ? asked.get("tab") : "overview");
    if (asked.get("find")) { search.value = asked.get("find"); list(); take(0); }
  }

  byId("title").textContent = Model.data.title;
  document.title = `${Model.data.title}: stp_fx explorer`;
  Panels.onShow(show);
  addEventListener("hashchange", follow);
  follow();
})();
