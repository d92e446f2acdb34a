"use strict";

// Live length over the text, as SVG.

// The highest value of each of some hundred stretches of the text: [x, value] with x from 0 to 1.
function outline(values, columns) {
  const n = values.length;
  const count = Math.min(columns, n);
  const found = [];
  for (let c = 0; c < count; c++) {
    let most = 0;
    for (let i = Math.floor((c * n) / count); i < Math.floor(((c + 1) * n) / count); i++) {
      most = Math.max(most, values[i]);
    }
    found.push([count === 1 ? 0 : c / (count - 1), most]);
  }
  return found;
}

function areaPath(values, columns, x, y, width, height, top) {
  const points = outline(values, columns).map(
    ([at, value]) => `${(x + at * width).toFixed(1)},${(y + height - (value / top) * height).toFixed(1)}`,
  );
  return `M${x},${y + height}L${points.join("L")}L${x + width},${y + height}Z`;
}

// A plot without axes, on the scale of a stream that never forgets, which is the dashed line.
function smallPlot(values, tokens, x, y, width, height) {
  return (
    `<path class="dense" d="M${x},${y + height}L${x + width},${y}"/>` +
    `<path class="area" d="${areaPath(values, 100, x, y, width, height, tokens)}"/>`
  );
}

// The plot of what is chosen, with axes on its own scale, and the cursor.
function largePlot(values, tokens, cursor, x, y, width, height) {
  const most = values.reduce((a, b) => Math.max(a, b), 1);
  const steps = [1, 2, 5].flatMap((n) => [n, 10 * n, 100 * n, 1000 * n, 10000 * n, 100000 * n]).sort((a, b) => a - b);
  const step = steps.find((one) => most / one <= 4) ?? most;
  const left = x + 44;
  const bottom = y + height - 18;
  const inner = { width: width - 64, height: height - 26 };
  const across = steps.find((one) => tokens / one <= 6) ?? tokens;
  const parts = [];
  for (let value = 0; value <= most; value += step) {
    const at = bottom - (value / most) * inner.height;
    parts.push(`<path class="rule" d="M${left},${at}h${inner.width}"/>`);
    parts.push(`<text x="${left - 5}" y="${at + 4}" text-anchor="end">${whole(value)}</text>`);
  }
  for (let value = 0; value <= tokens; value += across) {
    const at = left + (value / Math.max(1, tokens - 1)) * inner.width;
    parts.push(`<text x="${at}" y="${bottom + 14}" text-anchor="middle">${whole(value)}</text>`);
  }
  const share = Math.min(1, most / tokens);
  parts.push(`<path class="dense" d="M${left},${bottom}L${left + share * inner.width},${bottom - (share * tokens * inner.height) / most}"/>`);
  parts.push(`<path class="area" d="${areaPath(values, 300, left, bottom - inner.height, inner.width, inner.height, most)}"/>`);
  const at = left + (cursor / Math.max(1, tokens - 1)) * inner.width;
  parts.push(`<path class="at" d="M${at},${bottom}v${-inner.height}"/>`);
  return parts.join("");
}
