"use strict";

// What the page is about: the JSON that stands in it, with the ends of all streams decoded. `ends[s][j]` is the position
// of the first query that does not see token j in stream s, or the number of tokens if all queries see it.
async function readMap() {
  const map = JSON.parse(document.getElementById("data").textContent);
  const packed = Uint8Array.from(atob(map.ends), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = await new Response(stream).arrayBuffer();
  const lives = map.wide ? new Uint32Array(bytes) : new Uint16Array(bytes);
  const units = Math.ceil(map.tokens / map.pageSize);
  map.count = map.layers * map.streams;
  map.name = map.model.replace(/\/+$/, "").split("/").pop();
  map.unit = map.streams === 1 ? "layer" : "head";
  map.ends = [];
  for (let s = 0; s < map.count; s++) {
    const ends = new Int32Array(map.tokens);
    for (let j = 0; j < map.tokens; j++) {
      const unit = Math.floor(j / map.pageSize);
      const life = lives[s * units + unit];
      ends[j] = life ? unit * map.pageSize + life : map.tokens;
    }
    map.ends.push(ends);
  }
  map.live = map.ends.map((ends) => liveCounts(ends));
  map.meanLive = new Float64Array(map.tokens);
  for (const live of map.live) {
    live.forEach((value, i) => (map.meanLive[i] += value / map.count));
  }
  const late = map.meanLive.subarray(Math.floor(map.tokens / 2));
  map.lateLive = late.reduce((sum, value) => sum + value, 0) / late.length;
  return map;
}

// How many tokens each query sees, itself included.
function liveCounts(ends) {
  const change = new Int32Array(ends.length + 1).fill(1);
  ends.forEach((end) => change[end]--);
  const live = new Int32Array(ends.length);
  for (let i = 0, sum = 0; i < ends.length; i++) {
    live[i] = sum += change[i];
  }
  return live;
}

function streamName(map, s) {
  const layer = Math.floor(s / map.streams);
  return map.streams === 1 ? `layer ${layer}` : `layer ${layer}, head ${s % map.streams}`;
}

const capital = (words) => words[0].toUpperCase() + words.slice(1);
const numbers = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const whole = (value) => numbers.format(value);
const percent = (share) =>
  share > 0 && share < 0.0005 ? "<\u00a00.1\u00a0%" : `${(100 * share).toFixed(share > 0 && share < 0.0995 ? 1 : 0)}\u00a0%`;
const several = (count, one, more = `${one}s`) => `${whole(count)} ${count === 1 ? one : more}`;

// A token as it stands in a sentence or a table: line breaks and blanks are visible.
function shown(piece) {
  return piece.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣") || "(part of a character)";
}

const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/"/g, "&quot;");
