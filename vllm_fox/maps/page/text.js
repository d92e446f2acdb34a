"use strict";

// The text, a span for each token, coloured by what the query at the cursor sees.
class TextView {
  constructor(map, box, onPoint, onClick) {
    this.map = map;
    this.box = box;
    this.matches = new Uint8Array(map.tokens);
    this.classes = new Array(map.tokens).fill("");
    const all = document.createDocumentFragment();
    this.spans = map.pieces.map((piece, i) => {
      const span = document.createElement("span");
      span.textContent = piece;
      span.dataset.i = i;
      all.append(span);
      return span;
    });
    this.breaks = map.pieces.map((piece) => piece.includes("\n"));
    box.replaceChildren(all);
    const tokenAt = (event) => event.target.dataset.i;
    box.addEventListener("pointermove", (event) => tokenAt(event) !== undefined && onPoint(Number(tokenAt(event))));
    box.addEventListener("click", (event) => tokenAt(event) !== undefined && onClick(Number(tokenAt(event))));
  }

  // How a token stands to the query at `cursor`: before it by the share of heads that see it, after it by whether its
  // query sees the token at the cursor.
  state(i, cursor, s) {
    const { ends, count } = this.map;
    if (i === cursor) {
      return "cursor";
    }
    const [token, query] = i < cursor ? [i, cursor] : [cursor, i];
    let seen = 0;
    if (s >= 0) {
      seen = ends[s][token] > query ? count : 0;
    } else {
      for (let n = 0; n < count; n++) {
        seen += ends[n][token] > query;
      }
    }
    if (i > cursor) {
      return seen ? "sees" : "after";
    }
    return `n${seen === 0 ? 0 : seen === count ? 5 : 1 + Math.floor((4 * seen) / count)}`;
  }

  paint(cursor, s) {
    for (let i = 0; i < this.map.tokens; i++) {
      const name = this.state(i, cursor, s) + (this.matches[i] ? " match" : "") + (this.breaks[i] ? " break" : "");
      if (name !== this.classes[i]) {
        this.classes[i] = this.spans[i].className = name;
      }
    }
  }

  show(i) {
    const box = this.box.getBoundingClientRect();
    const span = this.spans[i].getBoundingClientRect();
    if (span.top < box.top + 10 || span.bottom > box.bottom - 10) {
      this.box.scrollTop += span.top - box.top - box.height / 2;
    }
  }

  // Mark all places where a text stands; return the first token of each.
  search(wanted) {
    this.matches.fill(0);
    const found = [];
    if (wanted) {
      const starts = [];
      let whole = "";
      for (const piece of this.map.pieces) {
        starts.push(whole.length);
        whole += piece;
      }
      const text = whole.toLowerCase();
      const word = wanted.toLowerCase();
      let token = 0;
      for (let at = text.indexOf(word); at >= 0; at = text.indexOf(word, at + word.length)) {
        while (token + 1 < starts.length && starts[token + 1] <= at) {
          token++;
        }
        found.push(token);
        for (let i = token; i < starts.length && starts[i] < at + word.length; i++) {
          this.matches[i] = 1;
        }
      }
    }
    return found;
  }
}
