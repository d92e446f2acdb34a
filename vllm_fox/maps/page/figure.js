"use strict";

// The figure that is saved: a picture of its own, of what is chosen, the text around the cursor and the heads shown.
const FIGURE = { width: 1200, lines: 18, columns: 136, small: { width: 140, height: 66, across: 8 } };

// All colours as they are now, because a saved picture has no page around it.
function colours() {
  const style = getComputedStyle(document.documentElement);
  const names = ["paper", "ink", "soft", "faint", "line", "seen", "later", "cursor-paper", "cursor-ink", ...Object.keys(MARKS)];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

// The lines of text around the cursor: each a list of {i, column, text}.
function linesAround(map, cursor) {
  const lines = [[]];
  let column = 0;
  let mine = 0;
  map.pieces.forEach((piece, i) => {
    piece.split("\n").forEach((part, n) => {
      if (n) {
        lines.push([]);
        column = 0;
      }
      const characters = [...part.replace(/\t/g, "    ")];
      while (characters.length) {
        if (column === FIGURE.columns) {
          lines.push([]);
          column = 0;
        }
        const text = characters.splice(0, FIGURE.columns - column).join("");
        lines.at(-1).push({ i, column, text });
        column += [...text].length;
      }
    });
    if (i === cursor) {
      mine = lines.length - 1;
    }
  });
  const first = Math.max(0, Math.min(mine - Math.floor(FIGURE.lines * 0.7), lines.length - FIGURE.lines));
  return lines.slice(first, first + FIGURE.lines);
}

// A text as lines of so many characters at most.
function wrapped(text, most) {
  const lines = [""];
  for (const word of text.split(" ")) {
    if (lines.at(-1).length + word.length >= most) {
      lines.push("");
    }
    lines.push(`${lines.pop()} ${word}`.trim());
  }
  return lines;
}

function figure(map, view, textView, headsView) {
  const c = colours();
  const parts = [];
  const text = (x, y, value, extra = "") => parts.push(`<text x="${x}" y="${y}" ${extra}>${escaped(value)}</text>`);
  text(20, 34, document.getElementById("headline").textContent, 'style="font-size:20px;font-weight:bold" class="ink"');
  const summary = wrapped(document.getElementById("summary").textContent, 150);
  summary.forEach((line, n) => text(20, 56 + 18 * n, line, 'style="font-size:13px" class="ink"'));
  let y = 74 + 18 * summary.length;
  text(20, y, document.getElementById("plot-name").textContent, 'style="font-size:14px;font-weight:bold" class="ink"');
  text(20, y + 18, document.getElementById("says").textContent, 'style="font-size:12px"');
  const values = view.stream < 0 ? map.meanLive : map.live[view.stream];
  const kind = view.stream < 0 ? "ink" : map.heads[view.stream].kind;
  parts.push(`<g class="${kind}">${largePlot(values, map.tokens, view.cursor, 20, y + 28, FIGURE.width - 40, 150)}</g>`);

  y += 208;
  text(20, y, document.getElementById("status").textContent, 'style="font-size:12px"');
  y += 12;
  const cell = { width: 8.5, height: 19 };
  for (const line of linesAround(map, view.cursor)) {
    y += cell.height;
    for (const { i, column, text: words } of line) {
      const state = textView.state(i, view.cursor, view.stream);
      const [x, width] = [20 + column * cell.width, [...words].length * cell.width];
      const shade = /^n[1-5]$/.test(state) ? `rgba(${c.seen},${0.08 * Number(state[1])})` : state === "cursor" ? c["cursor-paper"] : "";
      if (shade) {
        parts.push(`<rect x="${x}" y="${y - 14}" width="${width}" height="${cell.height}" fill="${shade}"/>`);
      }
      if (state === "sees") {
        parts.push(`<path d="M${x},${y + 3}h${width}" stroke="${c.later}" stroke-width="2"/>`);
      }
      const ink = { n0: c.faint, after: c.soft, cursor: c["cursor-ink"] }[state] ?? c.ink;
      parts.push(`<text x="${x}" y="${y}" xml:space="preserve" textLength="${width}" style="font:14px monospace;fill:${ink}">${escaped(words)}</text>`);
    }
  }

  y += 34;
  text(20, y, `Live tokens over the text, a plot for each of the ${several(headsView.shown.length, map.unit)} shown, with its mean over the second half (dashed: if nothing were forgotten)`, 'style="font-size:14px;font-weight:bold" class="ink"');
  const { width, height, across } = FIGURE.small;
  headsView.shown.forEach((s, n) => {
    const x = 20 + (n % across) * (width + 6);
    const top = y + 14 + Math.floor(n / across) * height;
    parts.push(`<g class="${map.heads[s].kind}">${smallPlot(map.live[s], map.tokens, x, top + 16, width - 8, height - 24)}</g>`);
    text(x, top + 11, `${MARKS[map.heads[s].kind]} ${streamName(map, s)}: ${whole(map.heads[s].mean_live)}`, 'style="font-size:11px"');
  });
  y += 24 + Math.ceil(headsView.shown.length / across) * height;
  const legend = Object.keys(MARKS).filter((name) => map.heads.some((head) => head.kind === name)).map((name) => `<tspan fill="${c[name]}" dx="12">${MARKS[name]} ${name}</tspan>`);
  parts.push(`<text x="8" y="${y}">${legend.join("")}</text>`);
  const kinds = Object.keys(MARKS).map((name) => `.${name}{color:${c[name]}}`);
  const style =
    `text{font-family:system-ui,"DejaVu Sans",sans-serif;font-size:11px;fill:${c.soft}}.ink{color:${c.ink};fill:${c.ink}}` +
    `.area{fill:currentColor;fill-opacity:.18;stroke:currentColor;stroke-width:1.4}.dense{fill:none;stroke:${c.faint};stroke-dasharray:3 3}` +
    `.rule{stroke:${c.line}}.at{stroke:${c.ink}}${kinds.join("")}`;
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" width="${FIGURE.width}" height="${y + 16}" viewBox="0 0 ${FIGURE.width} ${y + 16}">` +
    `<style>${style}</style><rect width="100%" height="100%" fill="${c.paper}"/>${parts.join("")}</svg>`
  );
}

function save(name, blob) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function asPng(svg) {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = 2 * image.width;
  canvas.height = 2 * image.height;
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}
