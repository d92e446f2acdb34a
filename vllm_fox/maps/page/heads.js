"use strict";

const MARKS = { global: "■", local: "●", "punctuation-dropper": "◆", "content-dependent": "▲" };

const ORDERS = {
  layer: (a, b) => a.number - b.number,
  short: (a, b) => a.mean_live - b.mean_live,
  long: (a, b) => b.mean_live - a.mean_live,
  varied: (a, b) => b.most_live / b.least_live - a.most_live / a.least_live,
  kind: (a, b) => Object.keys(MARKS).indexOf(a.kind) - Object.keys(MARKS).indexOf(b.kind),
};

// Rising numbers as a list: "1 to 3, 5 and 8".
function ranges(values) {
  const parts = [];
  for (let i = 0; i < values.length; i++) {
    const first = i;
    while (values[i + 1] === values[i] + 1) {
      i++;
    }
    parts.push(i - first > 1 ? `${values[first]} to ${values[i]}` : values.slice(first, i + 1).join(", "));
  }
  const listed = parts.join(", ").split(", ");
  const last = listed.pop();
  return listed.length ? `${listed.join(", ")} and ${last}` : last;
}

// The list of heads, with a small plot each, and what it is sorted and filtered by.
class HeadsView {
  constructor(map, onChoose) {
    this.map = map;
    this.list = document.getElementById("heads");
    this.sort = document.getElementById("sort");
    this.hidden = new Set();
    this.items = map.heads.map((head, s) => {
      head.number = s;
      const item = this.item(s, streamName(map, s), head.kind, head.mean_live, map.live[s], onChoose);
      item.setAttribute("aria-label", head.says);
      item.title = head.says;
      return item;
    });
    this.all = this.item(-1, `All ${map.unit}s`, "", map.lateLive, map.meanLive, onChoose);
    document.getElementById("unit").textContent = map.unit;
    this.sort.addEventListener("change", () => this.arrange());
    const filter = document.getElementById("filter");
    for (const kind of Object.keys(MARKS)) {
      const count = map.heads.filter((head) => head.kind === kind).length;
      if (!count) {
        continue;
      }
      const label = document.createElement("label");
      label.innerHTML =
        `<input type="checkbox" value="${kind}" checked> ` +
        `<span class="${kind}" aria-hidden="true">${MARKS[kind]}</span> ${kind} (${count})`;
      label.title = map.rules[kind];
      label.firstChild.addEventListener("change", (event) => {
        this.hidden[event.target.checked ? "delete" : "add"](kind);
        this.arrange();
      });
      filter.append(label);
      const line = document.createElement("li");
      line.innerHTML = `<span class="${kind}">${MARKS[kind]} ${kind}</span>: <small>${escaped(map.rules[kind])}</small> ${capital(this.named(kind))}.`;
      document.getElementById("by-kind").append(line);
    }
    this.arrange();
  }

  item(s, name, kind, live, values, onChoose) {
    const item = document.createElement("li");
    item.id = s < 0 ? "all" : `head-${s}`;
    item.dataset.s = s;
    item.dataset.kind = kind;
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", "false");
    item.innerHTML =
      `<span>${name}</span><span class="${kind}">${kind && `${MARKS[kind]} ${kind}`}</span><span class="figure">${whole(live)}</span>` +
      `<svg class="${kind}" viewBox="0 0 120 26" preserveAspectRatio="none" aria-hidden="true">` +
      `${smallPlot(values, this.map.tokens, 0, 1, 120, 24)}</svg>`;
    item.addEventListener("click", () => onChoose(s));
    return item;
  }

  // The heads of a kind, layer by layer, such as "layer 0 heads 1 to 3 and 5, layer 2 all heads".
  named(kind) {
    const { layers, streams, heads } = this.map;
    const own = (layer) => [...Array(streams).keys()].filter((h) => heads[layer * streams + h].kind === kind);
    const found = [...Array(layers).keys()].filter((layer) => own(layer).length);
    if (streams === 1) {
      return `layer${found.length > 1 ? "s" : ""} ${ranges(found)}`;
    }
    const inLayer = (mine) => (mine.length === streams ? "all heads" : `head${mine.length > 1 ? "s" : ""} ${ranges(mine)}`);
    return found.map((layer) => `layer ${layer} ${inLayer(own(layer))}`).join("; ");
  }

  // The numbers of the heads that are shown, in their order.
  arrange() {
    const heads = this.map.heads.filter((head) => !this.hidden.has(head.kind));
    this.shown = heads.sort((a, b) => ORDERS[this.sort.value](a, b) || a.number - b.number).map((head) => head.number);
    this.list.replaceChildren(this.all, ...this.shown.map((s) => this.items[s]));
  }

  // The head before or after `s` in the list; -1, all heads, is before the first.
  beside(s, way) {
    const at = Math.min(this.shown.length - 1, this.shown.indexOf(s) + way);
    return at < 0 ? -1 : this.shown[at];
  }

  paint(s) {
    const chosen = s < 0 ? this.all : this.items[s];
    this.list.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    chosen.setAttribute("aria-selected", "true");
    this.list.setAttribute("aria-activedescendant", chosen.id);
  }

  show(s) {
    if (s >= 0 && this.items[s].isConnected) {
      const item = this.items[s];
      // The row of all heads stays on top, and covers what is under it.
      const above = item.offsetTop - this.list.offsetTop - this.all.offsetHeight;
      this.list.scrollTop = Math.min(this.list.scrollTop, above);
      const below = item.offsetTop + item.offsetHeight - this.list.offsetTop - this.list.clientHeight;
      this.list.scrollTop = Math.max(this.list.scrollTop, below);
    }
  }
}
