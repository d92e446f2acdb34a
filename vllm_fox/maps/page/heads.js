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
    this.items = map.heads.map((head, s) => this.item(head, s, onChoose));
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
      line.innerHTML = `<span class="${kind}">${MARKS[kind]} ${kind}</span>: ${this.named(kind)}. <small>${escaped(map.rules[kind])}</small>`;
      document.getElementById("by-kind").append(line);
    }
    this.arrange();
  }

  item(head, s, onChoose) {
    head.number = s;
    const item = document.createElement("li");
    item.id = `head-${s}`;
    item.dataset.s = s;
    item.dataset.kind = head.kind;
    item.setAttribute("role", "option");
    item.setAttribute("aria-selected", "false");
    item.setAttribute("aria-label", head.says);
    item.title = head.says;
    item.innerHTML =
      `<span>${streamName(this.map, s)}</span>` +
      `<span class="${head.kind}">${MARKS[head.kind]} ${head.kind}</span>` +
      `<span class="figure">${whole(head.mean_live)} live</span>` +
      `<svg class="${head.kind}" viewBox="0 0 120 26" preserveAspectRatio="none" aria-hidden="true">` +
      `${smallPlot(this.map.live[s], this.map.tokens, 0, 1, 120, 24)}</svg>`;
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
    this.list.replaceChildren(...this.shown.map((s) => this.items[s]));
  }

  // The head before or after `s` in the list; -1, all heads, is before the first.
  beside(s, way) {
    const at = Math.min(this.shown.length - 1, this.shown.indexOf(s) + way);
    return at < 0 ? -1 : this.shown[at];
  }

  paint(s) {
    this.list.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    this.list.removeAttribute("aria-activedescendant");
    if (s >= 0) {
      this.items[s].setAttribute("aria-selected", "true");
      this.list.setAttribute("aria-activedescendant", this.items[s].id);
    }
  }

  show(s) {
    if (s >= 0 && this.items[s].isConnected) {
      const item = this.items[s];
      if (item.offsetTop < this.list.scrollTop + this.list.offsetTop) {
        this.list.scrollTop = item.offsetTop - this.list.offsetTop;
      }
      const below = item.offsetTop + item.offsetHeight - this.list.offsetTop - this.list.clientHeight;
      this.list.scrollTop = Math.max(this.list.scrollTop, below);
    }
  }
}
