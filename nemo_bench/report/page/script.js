"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const byId = id => document.getElementById(id);
  const board = byId("board"), headers = all("thead th", board), cards = all(".card");
  const viewer = byId("viewer");
  let state = {};

  // The state of the page is its address: #group=TM&sort=ssim&dir=descending&q=harbor&kind=VM&prompt=vm-01&seed=2
  const read = () => { state = Object.fromEntries(new URLSearchParams(location.hash.slice(1))); };
  const write = change => {
    state = Object.fromEntries(Object.entries({ ...state, ...change }).filter(([, value]) => value));
    history.replaceState(null, "", "#" + new URLSearchParams(state));
  };
  const set = change => { write({ ...change, prompt: "", seed: "" }); show(); };

  const switches = Object.fromEntries(["group", "model", "columns", "detail", "kind"].map(name => [name, all(`input[name="${name}"]`)]));
  const chosen = name => {
    const inputs = switches[name], input = inputs.find(input => input.value === state[name]) ?? inputs[0];
    if (input) input.checked = true;
    return input?.value ?? "";
  };
  const fields = { method: byId("method"), q: byId("search"), order: byId("order") };
  const words = name => (state[name] ?? "").toLowerCase().split(/\s+/).filter(Boolean);
  const holds = (element, wanted) => wanted.every(word => element.dataset.text.toLowerCase().includes(word));

  // Cards hold their strips as text until they come near the window.
  const fill = card => {
    const waiting = card.querySelector("noscript");
    if (!waiting) return;
    waiting.outerHTML = waiting.textContent;
    card.classList.add("filled");
    all("tr[data-text]", card).forEach(showRow);
  };
  const near = new IntersectionObserver(entries => entries.forEach(entry => {
    if (entry.isIntersecting) { near.unobserve(entry.target); fill(entry.target); }
  }), { rootMargin: "1200px" });

  // Rows of every table
  const showRow = row => {
    const { group, model } = row.dataset, wanted = chosen("model");
    row.hidden = Boolean(group && group !== chosen("group") || model && wanted && model !== wanted) || !holds(row, words("method"));
  };
  const showColumns = () => {
    const wanted = chosen("columns");
    headers.forEach(header => {
      header.hidden = Boolean(wanted && header.dataset.columns && !header.dataset.columns.split(" ").includes(wanted));
    });
    all("tbody tr", board).forEach(row => headers.forEach((header, i) => { row.cells[i].hidden = header.hidden; }));
  };

  // Order of the leaderboard
  const natural = header => header.dataset.better === "high" ? "descending" : "ascending";
  const sort = (header, direction) => {
    const sign = direction === "ascending" ? 1 : -1, column = headers.indexOf(header);
    const compare = ([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
    };
    const body = board.tBodies[0];
    body.append(...[...body.rows].map(row => [row.cells[column].dataset.value, row]).sort(compare).map(pair => pair[1]));
  };
  const showOrder = () => {
    headers.forEach(header => header.setAttribute("aria-sort", "none"));
    const header = headers.find(header => header.dataset.key === state.sort);
    if (!header) return;
    const direction = ["ascending", "descending"].includes(state.dir) ? state.dir : natural(header);
    header.setAttribute("aria-sort", direction);
    sort(header, direction);
  };

  // Gallery
  let order = "";
  const PAGE = matchMedia("(max-width: 56rem)").matches ? 4 : 24;
  let most = PAGE;
  const showCards = () => {
    const wanted = words("q"), kind = chosen("kind");
    const found = cards.filter(card => !(kind && card.dataset.kind !== kind) && holds(card, wanted));
    if ((state.order ?? "") !== order) {
      order = state.order ?? "";
      const worst = card => { const value = card.dataset.order.split(",")[order]; return value ? Number(value) : -Infinity; };
      byId("cards").append(...(order === "" ? cards : [...cards].sort((a, b) => worst(b) - worst(a))));
    }
    const matching = new Set(found), listed = all(".card").filter(card => matching.has(card));
    const named = listed.findIndex(card => card.dataset.address === state.prompt);
    most = Math.max(most, named + 1);
    const first = new Set(listed.slice(0, most));
    cards.forEach(card => { card.hidden = !first.has(card); });
    byId("count").textContent = `${listed.length} of ${cards.length} prompts`;
    byId("nothing").hidden = listed.length > 0;
    byId("more").hidden = listed.length <= most;
    byId("more").textContent = `Show ${Math.min(PAGE, listed.length - most)} more of ${listed.length - most}`;
  };
  byId("more").addEventListener("click", () => { most += PAGE; showCards(); });

  const show = () => {
    for (const [name, field] of Object.entries(fields)) {
      if (field && document.activeElement !== field) field.value = state[name] ?? "";
    }
    board.dataset.detail = chosen("detail");
    byId("group-meaning").hidden = false;
    byId("group-meaning").textContent = switches.group.find(input => input.value === chosen("group")).parentElement.title;
    all("tr[data-text]").forEach(showRow);
    showColumns();
    showOrder();
    showCards();
  };

  // All images of a prompt and seed, large
  let shown = null;
  const view = (card, seed) => {
    fill(card);
    const strips = all(".strips tbody tr", card).filter(strip => !strip.hidden);
    const count = Math.max(1, ...strips.map(strip => strip.querySelector(".row").children.length));
    shown = { card, seed: (seed + count) % count };
    const figure = (picture, name, scores) => {
      const box = document.createElement("figure"), caption = document.createElement("figcaption");
      const title = document.createElement("strong"), small = document.createElement("small");
      title.textContent = name;
      small.textContent = scores ?? "";
      caption.append(title, small);
      box.append(picture.cloneNode(), caption);
      return box;
    };
    const reference = card.querySelector(".reference :is(img, .gap)");
    const pictures = strips.map(strip => [strip.querySelector(".row").children[shown.seed], strip.querySelector(".name > :last-child").textContent]);
    byId("viewer-title").textContent = card.querySelector("h3").textContent;
    byId("viewer-seed").textContent = `${shown.seed + 1} of ${count}`;
    byId("viewer-images").replaceChildren(
      ...(reference ? [figure(reference, "Training image")] : []),
      ...pictures.filter(([picture]) => picture).map(([picture, name]) => figure(picture, name, picture.title)),
    );
    if (!viewer.open) viewer.showModal();
    write({ prompt: card.dataset.address, seed: shown.seed + 1 });
  };
  // What the address names: a prompt, or all its images of a seed.
  const follow = () => {
    const card = state.prompt && cards.find(card => card.dataset.address === state.prompt);
    if (!card) return;
    fill(card);
    card.scrollIntoView();
    if (state.seed) view(card, Number(state.seed) - 1);
  };
  const neighbour = step => {
    const listed = all(".card:not([hidden])");
    return listed[(listed.indexOf(shown.card) + step + listed.length) % listed.length];
  };
  byId("cards").addEventListener("click", event => {
    const card = event.target.closest(".card");
    if (event.target.closest(".open")) view(card, 0);
    else if (event.target.matches(".row > *")) view(card, [...event.target.parentElement.children].indexOf(event.target));
    else if (event.target.matches(".reference img")) view(card, 0);
  });
  viewer.addEventListener("click", event => {
    const step = event.target.dataset.step;
    if (step) view(shown.card, shown.seed + Number(step));
    else if (event.target === viewer || event.target.id === "viewer-close") viewer.close();
  });
  viewer.addEventListener("keydown", event => {
    const seeds = { ArrowLeft: -1, ArrowRight: 1 }[event.key], prompts = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!seeds && !prompts) return;
    event.preventDefault();
    if (seeds) view(shown.card, shown.seed + seeds);
    else view(neighbour(prompts), shown.seed);
  });
  viewer.addEventListener("close", () => { write({ seed: "" }); shown.card.querySelector(".open").focus(); });

  // Tables and figures as files
  const save = (name, blob) => {
    const link = document.createElement("a");
    link.download = name;
    link.href = URL.createObjectURL(blob);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const button = (words, of, action) => {
    const made = document.createElement("button");
    made.type = "button";
    made.className = "save";
    made.append(words, Object.assign(document.createElement("span"), { className: "sr", textContent: ` of ${of}` }));
    made.addEventListener("click", action);
    return made;
  };
  const quoted = text => /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  const cellText = cell => (cell.dataset.csv ?? cell.dataset.value ?? [...cell.childNodes].filter(node => node.nodeName !== "SMALL").map(node => node.textContent).join("")).replace(/\s+/g, " ").trim();
  const csv = table => [...table.rows].filter(row => !row.hidden)
    .map(row => [...row.cells].filter(cell => !cell.hidden)
      .flatMap(cell => [quoted(cellText(cell)), ...Array(cell.colSpan - 1).fill("")]).join(",")).join("\n") + "\n";
  all(".scroll > table:not(.strips)").forEach(table => {
    const name = table.closest(".scroll").getAttribute("aria-label") ?? byId(table.closest(".scroll").getAttribute("aria-labelledby")).textContent;
    const file = `${name.toLowerCase().replace(/[^a-z0-9]+/g, "-")}.csv`;
    table.closest(".scroll").after(button("Download CSV", name, () => save(file, new Blob([csv(table)], { type: "text/csv" }))));
  });
  const SVG = "image/svg+xml";
  const drawn = svg => {
    const copy = svg.cloneNode(true), own = getComputedStyle(document.documentElement);
    const [, , width, height] = svg.getAttribute("viewBox").split(" ");
    copy.setAttribute("xmlns", svg.namespaceURI);
    copy.setAttribute("width", width);
    copy.setAttribute("height", height);
    copy.setAttribute("style", `color: ${own.getPropertyValue("--ink")}; background: ${own.getPropertyValue("--paper")}; font-family: sans-serif`);
    return copy.outerHTML.replace(/var\((--[a-z]+)\)/g, (_, name) => own.getPropertyValue(name));
  };
  const raster = (svg, name) => {
    const image = new Image(), canvas = document.createElement("canvas"), scale = 3;
    image.addEventListener("load", () => {
      canvas.width = scale * image.width;
      canvas.height = scale * image.height;
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob(blob => save(`${name}.png`, blob));
    });
    image.src = `data:${SVG};charset=utf-8,${encodeURIComponent(drawn(svg))}`;
  };
  all(".figures figure[id]").forEach(figure => {
    const svg = figure.querySelector("svg"), title = figure.querySelector("h3").textContent;
    figure.append(
      button("SVG", title, () => save(`${figure.id}.svg`, new Blob([drawn(svg)], { type: SVG }))), " ",
      button("PNG", title, () => raster(svg, figure.id)),
    );
  });

  const copy = async button => {
    const source = byId(button.dataset.copy), before = button.innerHTML;
    try {
      await navigator.clipboard.writeText(source.textContent);
    } catch {
      getSelection().selectAllChildren(source);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.innerHTML = before; }, 1500);
  };

  // Paper can't be filtered: it gets every group, unless one was chosen, and the prompts that are shown.
  addEventListener("beforeprint", () => {
    const own = switches.group.map(input => input.value).filter((name, _, names) => name !== "all" || names.length === 1);
    if (!state.group) all("tr[data-group]").forEach(row => { row.hidden = !own.includes(row.dataset.group) || !holds(row, words("method")); });
    most = Infinity;
    showCards();
    cards.filter(card => !card.hidden).forEach(fill);
    all("img").forEach(image => { image.loading = "eager"; });
  });
  addEventListener("afterprint", () => { most = PAGE; show(); });

  headers.forEach(header => header.querySelector("button").addEventListener("click", () => {
    const current = header.getAttribute("aria-sort"), first = natural(header);
    const dir = current !== first ? first : first === "ascending" ? "descending" : "ascending";
    set({ sort: header.dataset.key, dir });
  }));
  for (const [name, inputs] of Object.entries(switches)) {
    inputs.forEach(input => input.addEventListener("change", () => set({ [name]: input.value })));
  }
  for (const [name, field] of Object.entries(fields)) field?.addEventListener("input", () => set({ [name]: field.value }));
  all(".copy").forEach(button => button.addEventListener("click", () => copy(button)));
  // An anchor of a section holds no "=" and leaves the state alone.
  addEventListener("hashchange", () => { if (location.hash.includes("=")) { read(); show(); follow(); } });

  document.documentElement.classList.add("js");
  read();
  show();
  cards.forEach(card => near.observe(card));
  follow();
})();
