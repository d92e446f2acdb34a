"use strict";

// The side of one token: how long each head sees it.
class TokenView {
  constructor(map, onChoose) {
    this.map = map;
    this.cells = [];
    const columns = [...Array(map.streams).keys()];
    const table = document.createElement("table");
    const head = map.streams === 1 ? "" : `<tr><th></th>${columns.map((h) => `<th scope="col">${h}</th>`).join("")}</tr>`;
    table.innerHTML = head;
    for (let layer = 0; layer < map.layers; layer++) {
      const row = table.insertRow();
      row.innerHTML = `<th scope="row">layer ${layer}</th>`;
      for (const column of columns) {
        const cell = row.insertCell();
        const s = layer * map.streams + column;
        cell.addEventListener("click", () => onChoose(s));
        this.cells.push(cell);
      }
    }
    document.getElementById("grid").replaceChildren(table);
  }

  paint(cursor, s) {
    const { map } = this;
    const later = map.tokens - cursor - 1;
    let always = 0;
    let gone = 0;
    this.cells.forEach((cell, n) => {
      const end = map.ends[n][cursor];
      const queries = end - cursor - 1;
      const stays = end === map.tokens;
      always += stays;
      gone += !stays;
      const text = !later ? "–" : stays ? "all" : whole(queries);
      cell.textContent = map.streams > 16 ? "" : text;
      cell.title = `${streamName(map, n)}: ${!later ? "there are no later queries" : stays ? "seen to the end of the text" : `seen by the next ${several(queries, "query", "queries")}, then dropped`}`;
      cell.style.background = `rgba(var(--seen), ${later ? (0.55 * queries) / later : 0})`;
      cell.className = n === s ? "chosen" : "";
    });
    document.getElementById("token-name").textContent = `Who still sees “${shown(map.pieces[cursor])}”, at position ${whole(cursor)}`;
    document.getElementById("token-says").textContent = !later
      ? "This is the last token: there are no later queries."
      : `At the end of the text ${whole(always)} of ${several(map.count, map.unit)} still ${always === 1 ? "sees" : "see"} it, ` +
        `${whole(gone)} ${gone === 1 ? "has" : "have"} dropped it. Each field says how many of the ${several(later, "query", "queries")} after it see it.`;
  }
}

// The classes of tokens that the text has, those first that are dropped first.
function classesByLife(map, row) {
  return map.classNames
    .map((name, n) => ({ name, seen: map.classShares[row][n] }))
    .filter((one) => one.seen !== null)
    .sort((a, b) => a.seen - b.seen);
}

// What is dropped first in the whole model, in sentences; nothing where pages are dropped as a whole.
function droppedFirstSaid(map) {
  if (map.pageSize > 1) {
    return "";
  }
  const tokens = map.droppedFirst[map.count].slice(0, 5).map(([token]) => `“${shown(token)}”`);
  const [soonest, half] = map.soonest;
  const first =
    map.count > 1
      ? ` ${capital(streamName(map, soonest))} drops soonest: half of all tokens are seen by ${several(half, "later query", "later queries")} at most.`
      : "";
  return first + (tokens.length ? ` Single tokens that are dropped first: ${tokens.join(", ")}.` : "");
}

// What is dropped first, by the chosen head or by all.
function paintDroppedFirst(map, s) {
  const row = s < 0 ? map.count : s;
  const who = s < 0 ? `all ${map.unit}s` : streamName(map, s);
  document.getElementById("first-name").textContent = `What is dropped first, by ${who}`;
  // Where pages are dropped as a whole, age decides and nothing else.
  document.getElementById("first-section").hidden = map.pageSize > 1;
  if (map.pageSize > 1) {
    return;
  }
  const classes = classesByLife(map, row);
  const tokens = map.droppedFirst[row];
  document.getElementById("first").innerHTML =
    "<table><caption>Single tokens, seen by the smallest share first</caption>" +
    "<tr><th>token</th><th>times</th><th>later queries that see it (median)</th><th>share of later queries that see it</th></tr>" +
    tokens
      .map(([token, times, seen, lives]) => `<tr><td><code>${escaped(shown(token))}</code></td><td>${times}</td><td>${whole(lives - 1)}</td><td>${percent(seen)}</td></tr>`)
      .join("") +
    "</table><table><caption>Classes of tokens, soonest first</caption><tr><th>class</th><th>share of later queries that see it</th></tr>" +
    classes.map((one) => `<tr><td>${one.name}</td><td>${percent(one.seen)}</td></tr>`).join("") +
    "</table>" +
    (s < 0 && map.count > 1 && map.count <= MOST_COLUMNS ? classesByStream(map, classes) : "");
}

// A table of all streams is no wider than this.
const MOST_COLUMNS = 12;

// The same for each stream: they differ, which a mean hides.
function classesByStream(map, classes) {
  const columns = map.heads.map((head) => `<th>${streamName(map, head.number)}</th>`).join("");
  const rows = classes.map(({ name }) => {
    const n = map.classNames.indexOf(name);
    return `<tr><td>${name}</td>${map.heads.map((head) => `<td>${percent(map.classShares[head.number][n])}</td>`).join("")}</tr>`;
  });
  return `<table><caption>Share of later queries that see a class, by ${map.unit}</caption><tr><th>class</th>${columns}</tr>${rows.join("")}</table>`;
}
