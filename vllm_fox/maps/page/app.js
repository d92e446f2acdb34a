"use strict";

// The page: what is chosen, and what keys and the pointer do.
async function start() {
  const map = await readMap();
  const byId = (name) => document.getElementById(name);
  const view = { cursor: Math.floor((2 * (map.tokens - 1)) / 3), stream: -1, held: false };
  let waiting = false;
  let places = [];
  let place = -1;
  let origin = view.cursor;

  const text = new TextView(map, byId("text"), point, hold);
  const heads = new HeadsView(map, (s) => choose(s === view.stream ? -1 : s));
  const token = new TokenView(map, choose);
  describe();
  text.show(view.cursor);
  paint();

  function point(i) {
    if (!view.held && i !== view.cursor) {
      view.cursor = i;
      request();
    }
  }

  function hold(i) {
    view.held = !view.held;
    view.cursor = i;
    request();
  }

  function move(i) {
    view.cursor = Math.max(0, Math.min(map.tokens - 1, i));
    view.held = true;
    text.show(view.cursor);
    request();
  }

  function choose(s) {
    view.stream = s;
    heads.show(s);
    request();
  }

  // Many events may come before the next picture is drawn.
  function request() {
    if (!waiting) {
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        paint();
      });
    }
  }

  function paint() {
    const { cursor, stream } = view;
    text.paint(cursor, stream);
    heads.paint(stream);
    token.paint(cursor, stream);
    const all = stream < 0;
    const live = all ? map.meanLive[cursor] : map.live[stream][cursor];
    const who = all ? `all ${map.unit}s together` : streamName(map, stream);
    byId("plot-name").textContent = `Live tokens over the text: ${who}`;
    byId("says").textContent = all
      ? `A ${map.unit} keeps ${several(Math.round(map.lateLive), "token")} on average over the second half of the text, and ${whole(map.meanLive[map.tokens - 1])} of ${whole(map.tokens)} at its end. Dashed: if nothing were forgotten.`
      : map.heads[stream].says;
    const kind = all ? "" : map.heads[stream].kind;
    const values = all ? map.meanLive : map.live[stream];
    byId("plot").innerHTML =
      `<svg class="${kind}" viewBox="0 0 480 150" role="img" aria-label="${escaped(byId("plot-name").textContent)}">` +
      `${largePlot(values, map.tokens, cursor, 0, 0, 480, 150)}</svg>`;
    byId("status").textContent =
      `Token at position ${whole(cursor)} (of 0 to ${whole(map.tokens - 1)}), “${shown(map.pieces[cursor])}”${view.held ? " (held)" : ""}. ` +
      (all
        ? `Its query sees ${whole(live)} of ${several(cursor + 1, "token")} so far in the average ${map.unit}: ${percent(1 - live / (cursor + 1))} of the places are given back.`
        : `Its query sees ${whole(live)} of ${several(cursor + 1, "token")} so far in ${streamName(map, stream)}; ${lifetime(cursor, stream)}.`);
    byId("legend").innerHTML = all
      ? `Before the cursor: seen by <span class="n0">no</span> <span class="n1">few</span> <span class="n3">half</span> <span class="n5">all</span> ${map.unit}s. After it: <span class="sees">some ${map.unit}s still see it</span>.`
      : 'Before the cursor: <span class="n5">still seen</span>, <span class="n0">dropped</span>. After it: <span class="sees">still sees the token at the cursor</span>.';
    paintDroppedFirst(map, stream);
  }

  function lifetime(i, s) {
    const end = map.ends[s][i];
    if (i === map.tokens - 1) {
      return "there are no later queries";
    }
    return end === map.tokens ? "all later queries see this token" : `the query at ${whole(end)} is the first that does not see this token`;
  }

  function describe() {
    const part = map.textTokens > map.tokens;
    const read = part ? `the first ${whole(map.tokens)} of ${several(map.textTokens, "token")}` : `all ${several(map.tokens, "token")}`;
    const kinds = Object.keys(MARKS)
      .map((kind) => [kind, map.heads.filter((head) => head.kind === kind).length])
      .filter(([, count]) => count)
      .map(([kind, count]) => `${whole(count)} ${kind}`);
    const shape = map.streams === 1 ? several(map.layers, "layer") : `${several(map.layers, "layer")} of ${several(map.streams, "KV head")}`;
    const more = part ? " (<code>--max-tokens N</code> for more, up to the model's longest prompt)" : "";
    byId("headline").textContent =
      `${percent(map.givenBackAtEnd)} of the KV cache is given back at the end of the text (${percent(map.givenBack)} on average over it)`;
    byId("summary").innerHTML =
      `${escaped(map.name)} (${escaped(map.family)}): ${shape}, each ${map.unit} forgetting on its own. ` +
      `Shown are ${read}, from ${map.source === "engine" ? "the engine's pages" : "transformers"}${more}. ` +
      `Of ${several(map.count, map.unit)}: ${kinds.join(", ")}.${escaped(droppedFirstSaid(map))}`;
    byId("meaning").textContent =
      `A stream is what forgets on its own: ${map.stream}. A token is live in it as long as later queries see it. ` +
      (map.pageSize > 1
        ? `Here a page of ${map.pageSize} tokens is dropped as a whole, once it has been proved negligible for all queries to come; that is looked at whenever a page is full.`
        : "Here tokens are dropped one by one, and none comes back.") +
      " Positions count from 0.";
    byId("rules").innerHTML = Object.keys(MARKS)
      .map((kind) => `<dt class="${kind}">${MARKS[kind]} ${kind}</dt><dd>${escaped(map.rules[kind])}</dd>`)
      .join("");
    byId("heads-name").textContent = map.streams === 1 ? "Layers" : "Heads";
    setTheme(matchMedia("(prefers-color-scheme: dark)").matches);
  }

  function find(way) {
    if (places.length) {
      place = (place + way + places.length) % places.length;
      move(places[place]);
    } else {
      move(origin);
    }
    byId("found").textContent = byId("search").value ? (places.length ? `${place + 1} of ${places.length}` : "not found") : "";
  }

  function search() {
    places = text.search(byId("search").value);
    place = -1;
    find(1);
  }

  byId("search").addEventListener("focus", () => (origin = view.cursor));
  byId("search").addEventListener("input", search);

  function setTheme(dark) {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    byId("theme").textContent = dark ? "Light" : "Dark";
  }

  function switchTheme() {
    setTheme(document.documentElement.dataset.theme === "light");
  }

  function explain() {
    byId("explained").hidden = !byId("explained").hidden;
    byId("help").setAttribute("aria-expanded", String(!byId("explained").hidden));
  }

  byId("theme").addEventListener("click", switchTheme);
  byId("help").addEventListener("click", explain);
  const file = `${map.name}-map`;
  const svg = () => figure(map, view, text, heads);
  byId("save-svg").addEventListener("click", () => save(`${file}.svg`, new Blob([svg()], { type: "image/svg+xml" })));
  byId("save-png").addEventListener("click", async () => save(`${file}.png`, await asPng(svg())));

  const keys = {
    ArrowLeft: (event) => move(view.cursor - (event.shiftKey ? 10 : 1)),
    ArrowRight: (event) => move(view.cursor + (event.shiftKey ? 10 : 1)),
    Home: () => move(0),
    End: () => move(map.tokens - 1),
    ArrowUp: () => choose(heads.beside(view.stream, -1)),
    ArrowDown: () => choose(heads.beside(view.stream, 1)),
    a: () => choose(-1),
    Escape: () => choose(-1),
    "/": () => byId("search").select(),
    t: switchTheme,
    "?": explain,
  };
  document.addEventListener("keydown", (event) => {
    if (event.target === byId("search")) {
      if (event.key === "Enter" && places.length) {
        find(event.shiftKey ? -1 : 1);
      } else if (event.key === "Escape") {
        byId("search").value = "";
        origin = view.cursor; // what was found stays chosen
        search();
        byId("text").focus();
      }
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT" || !(event.key in keys)) {
      return;
    }
    event.preventDefault();
    keys[event.key](event);
  });

  // Whoever measures how fast the page opens learns it here: milliseconds until it has been drawn.
  requestAnimationFrame(() => setTimeout(() => (document.body.dataset.opened = performance.now().toFixed(0))));
}

start();
