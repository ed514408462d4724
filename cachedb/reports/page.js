
"use strict";
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const make = (name, properties = {}, ...inside) => {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...inside);
  return element;
};
const compare = (a, b) => a - b || (a < b ? -1 : a > b ? 1 : 0);
const grouped = number => number.toLocaleString("en");
function formatSize(size) {
  // As in text.py: powers of 1000, three digits.
  let unit = 0;
  while (size >= 999.5 && unit < 4) { size /= 1000; unit++; }
  return `${Number(size.toPrecision(3))} ${["B", "kB", "MB", "GB", "TB"][unit]}`;
}

// Names: drop the first parts of a path that is too long, then letters amid its last part, as in words.py.
function shortenPath(name, letters) {
  if (name.length <= letters) return name;
  const parts = name.split("/");
  for (let first = 1; first < parts.length; first++) {
    const rest = parts.slice(first).join("/");
    if (rest.length + 2 <= letters) return "…/" + rest;
  }
  const last = parts.at(-1);
  if (last.length <= letters) return last;
  return last.slice(0, Math.floor(letters / 2)) + "…" + last.slice(last.length - Math.floor((letters - 1) / 2));
}

// Tables: a click on a heading sorts, numbers largest first; the search field filters the rows.
// A record is {row, keys, text}. The table shows at most as many rows as the page came with.
const tables = new Map();
function readRow(row) {
  return {
    row,
    keys: [...row.cells].map(cell => cell.dataset.v ?? cell.textContent.trim().toLowerCase()),
    text: ` ${row.cells[0].title} ${row.textContent} `.toLowerCase(),
  };
}
const DATA = JSON.parse(document.querySelector("#all-images").textContent);
function readImages(rows) {
  const day = number => number ? String(number).padStart(8, "0").replace(/(....)(..)(..)/, "$1-$2-$3") : "";
  const cell = (text, title = "") => make("td", {className: "n", textContent: text, title});
  const exact = size => cell(formatSize(size), `${grouped(size)} bytes`);
  const part = (kind, size) => {
    const element = make("i", {className: kind, hidden: !size});
    element.style.width = `${100 * size / DATA.images[0][4]}%`;
    return element;
  };
  const bar = (unique, shared) => make("div", {className: "bar"}, part("unique", unique), part("shared", shared));
  return DATA.images.map((image, number) => {
    const [repository, reference, digest, platforms, size, missing, unique, shared, created, added, used, age, bits, base, layers] = image;
    const name = DATA.repositories[repository] + reference;
    const platform = platforms.map(one => DATA.platforms[one]);
    const facts = DATA.facts.filter((_, bit) => bits >> bit & 1);
    return {
      keys: [name, platform.join(), size, unique, shared, unique + shared, created, added, used],
      get text() {
        const words = [name, digest.includes(":") ? digest : "sha256:" + digest, ...platform, "repository:" + DATA.repositories[repository], "used:" + DATA.ages[age],
          "base:" + DATA.bases[base], ...platform.map(one => "platform:" + one), ...facts.map(fact => "is:" + fact),
          ...layers.map(layer => "layer:" + DATA.layers[layer]), rows[number]?.querySelector("ul").textContent ?? ""];
        const value = ` ${words.join(" ")} `.toLowerCase();
        Object.defineProperty(this, "text", {value});
        return value;
      },
      get row() {
        const value = rows[number] ?? make("tr", {},
          make("th", {className: "text", scope: "row", title: digest}, make("bdi", {textContent: name}),
            ...facts.filter(fact => fact !== "incomplete").map(fact => make("span", {className: "muted", textContent: " " + fact})),
            missing ? make("span", {className: "tag", textContent: ` incomplete, ${formatSize(missing)} missing`}) : ""),
          make("td", {textContent: platform.join(", ")}), exact(size), exact(unique), exact(shared), make("td", {}, bar(unique, shared)),
          cell(day(created)), cell(day(added)), cell(day(used)));
        Object.defineProperty(this, "row", {value});
        return value;
      },
    };
  });
}
for (const table of all("table.rows")) {
  const body = table.tBodies[0], section = table.closest("section"), find = section.querySelector(".find");
  const rows = [...body.rows], input = find.querySelector("input"), output = find.querySelector("output");
  const records = section.id === "images" ? readImages(rows) : rows.map(readRow);
  let order = records;
  function update() {
    const words = input.value.toLowerCase().split(/\s+/).filter(word => word)
      .map(word => /^(is|platform|used|base|repository|layer):./.test(word) ? ` ${word} ` : word);
    const found = words.length ? order.filter(({text}) => words.every(word => text.includes(word))) : order;
    body.replaceChildren(...found.slice(0, rows.length).map(({row}) => row));
    output.value = words.length ? `${grouped(found.length)} of ${grouped(records.length)}` : "";
    if (words.length && found.length > rows.length) output.value += `, the first ${grouped(rows.length)} are listed`;
  }
  all("thead th", table).forEach((heading, column) => {
    const button = make("button", {}, ...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const numbers = heading.classList.contains("n");
      const up = heading.ariaSort ? heading.ariaSort === "descending" : !numbers;
      all("th", table).forEach(other => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      order = [...records].sort((a, b) => (up ? 1 : -1) * compare(a.keys[column], b.keys[column]));
      update();
    });
  });
  find.hidden = false;
  input.addEventListener("input", update);
  tables.set(section.id, {input, update});
}

// Links: a counter filters the table of images; a link to a row or a tile shows it, even if it is filtered or zoomed away.
document.addEventListener("click", event => {
  const link = event.target.closest?.("a[href^='#']");
  if (!link) return;
  const [, section] = (link.getAttribute("href").match(/^#(image|layer|repository)-/) ?? []);
  if (link.dataset.find) {
    event.preventDefault();
    const {input, update} = tables.get("images");
    input.value = link.dataset.find;
    update();
    document.querySelector("#images").scrollIntoView();
    input.focus({preventScroll: true});
  } else if (section) {
    const {input, update} = tables.get(section === "repository" ? "repositories" : section + "s");
    if (!document.querySelector(link.getAttribute("href"))) {
      input.value = "";
      update();
    }
  } else if (link.getAttribute("href").startsWith("#map-")) {
    zoom(document.querySelector(link.getAttribute("href")).parentNode);
  }
});

// Commands: a button copies the text.
for (const command of all(".command")) {
  const text = command.textContent, button = make("button", {type: "button", textContent: "Copy"});
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const range = document.createRange();
      range.selectNodeContents(command.firstElementChild);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
  });
  command.append(button);
}

// Charts: show titles without delay, next to the pointer or at the focused element.
const tip = make("div", {className: "tip", hidden: true});
document.body.append(tip);
for (const title of all("svg title")) {
  title.parentNode.setAttribute("aria-label", title.textContent);
  title.remove();
}
function show(target, x, y) {
  const from = target.closest?.("svg [aria-label]");
  tip.hidden = !from;
  if (!from) return;
  tip.textContent = from.getAttribute("aria-label");
  tip.style.left = Math.max(4, Math.min(x + 14, innerWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = (y + 18 + tip.offsetHeight > innerHeight ? Math.max(4, y - tip.offsetHeight - 10) : y + 18) + "px";
}
document.addEventListener("pointermove", event => show(event.target, event.clientX, event.clientY));
document.addEventListener("focusin", event => {
  const box = event.target.getBoundingClientRect();
  show(event.target, box.left, box.top);
});

// The treemap: a click or Enter opens a tile; a click on the path above it or Escape closes it.
const map = document.querySelector("#map"), path = document.querySelector("#path");
const place = (tile, box) => ["x", "y", "width", "height"].forEach((name, number) => tile.setAttribute(name, box[number]));
const tiles = map ? all("svg", map) : [], homes = new Map(tiles.map(tile =>
  [tile, ["x", "y", "width", "height"].map(name => tile.getAttribute(name))]));
const names = new Map(tiles.map(tile => {
  let text = tile.querySelector(":scope > text, :scope > a > text");
  if (!text) {
    text = document.createElementNS(tile.namespaceURI, "text");
    text.setAttribute("x", "5");
    (tile.querySelector(":scope > a") ?? tile).append(text);
  }
  return [tile, text];
}));
function label() {
  // Show the part of a name that fits, below the headings of the enclosing tiles, as in treemap.py.
  // The box of a nested svg includes text that is clipped, so measure its rectangle; and measure all before any change.
  const boxes = new Map(tiles.map(tile => [tile, tile.firstElementChild.getBoundingClientRect()]));
  const write = (tile, words, y = 0) => {
    const text = names.get(tile);
    if (text.textContent !== words) text.textContent = words;
    if (words) text.setAttribute("y", y);
  };
  const walk = (parent, headings) => {
    for (const tile of parent.children) {
      if (!boxes.has(tile)) continue;
      const box = boxes.get(tile), {name, size} = tile.dataset, whole = `${name}  ${size}`, top = parent === map;
      const letter = top ? 8.6 : tile.matches(".repository, .namespace") ? 7.4 : 6.6, line = top ? 18 : 15;
      const letters = Math.floor((box.width - 10) / letter);
      const fits = letters >= Math.min(name.length, 6) && !names.get(tile).closest("[hidden]");
      const words = !fits ? "" : whole.length <= letters ? whole : name.length <= letters ? name
        : tile.classList.contains("path") ? shortenPath(name, letters) : name.slice(0, letters - 1) + "…";
      const mine = {left: box.left + 5, right: box.left + 5 + words.length * letter, top: box.top + 3};
      for (const {left, right, top, bottom} of headings) {
        if (mine.left < right && left < mine.right && mine.top < bottom && top < mine.top + line) mine.top = bottom;
      }
      mine.bottom = mine.top + line;
      const shown = words && mine.bottom <= box.bottom;
      write(tile, shown ? words : "", mine.bottom - box.top - 4);
      walk(tile, shown ? [...headings, mine].sort((a, b) => a.top - b.top) : headings);
    }
  };
  walk(map, []);
}
function zoom(into) {
  const open = [];
  for (let tile = into; tile !== map; tile = tile.parentNode) open.unshift(tile);
  for (const tile of tiles) {
    place(tile, homes.get(tile));
    if (tile.parentNode === into && tile.querySelector("svg")) tile.setAttribute("tabindex", "0");
    else if (tile === into) tile.setAttribute("tabindex", "-1");
    else tile.removeAttribute("tabindex");
  }
  for (const child of all("[hidden]", map)) child.removeAttribute("hidden");
  for (const tile of open) {
    for (const other of tile.parentNode.children) if (other !== tile) other.setAttribute("hidden", "");
    place(tile, ["0", "0", "100%", "100%"]);
  }
  path.replaceChildren(...[map, ...open].map(tile => {
    const button = make("button", {
      textContent: tile === map ? "All" : `${tile.dataset.name}, ${tile.dataset.size}`,
      disabled: tile === into,
    });
    button.addEventListener("click", () => zoom(tile));
    return button;
  }));
  const row = into !== map && into.querySelector(":scope > a");
  if (row) path.append(make("a", {href: row.getAttribute("href"), textContent: "Show in the table"}));
  if (into === map) path.textContent = "Click a rectangle, or press Enter on it, to open it.";
  tip.hidden = true;
  label();
  map.now = into;
}
if (map) {
  const go = target => {  // open the visible tile that contains the target
    let tile = target.closest("#map svg");
    while (tile && tile.parentNode !== map.now) tile = tile.parentNode.closest("#map svg");
    if (tile?.querySelector("svg")) zoom(tile);
  };
  for (const tile of tiles.filter(tile => tile.querySelector("svg"))) tile.setAttribute("role", "button");
  for (const link of all("a", map)) link.setAttribute("tabindex", "-1");  // the path above the map has the link
  map.addEventListener("click", event => { if (!event.target.closest("a")) go(event.target); });
  map.addEventListener("keydown", event => { if (event.key === "Enter") go(event.target); });
  document.addEventListener("keydown", event => {
    if (event.key === "Escape" && map.now !== map) zoom(map.now.parentNode);
  });
  path.hidden = false;
  map.classList.add("live");
  addEventListener("resize", () => label());
  zoom(map);
}
