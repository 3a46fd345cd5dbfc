// Filter the pictures, go from one to the next, and show one large. Without a script every thumbnail is a plain link.
(() => {
  "use strict";
  const find = (id) => document.getElementById(id);
  const viewer = find("viewer");
  const large = find("large");
  const words = find("words");
  const selects = [...document.querySelectorAll("select[data-setting]")];
  const cards = [...document.querySelectorAll(".card")].map((item) => {
    const link = item.querySelector("a");
    const rows = [...item.querySelectorAll("dl div")].map((row) => [...row.children].map((cell) => cell.textContent));
    const name = decodeURIComponent(link.getAttribute("href").slice(2));
    return { item, link, name, settings: new Map(rows), text: `${item.textContent}\n${name}`.toLowerCase() };
  });
  let shown = cards;
  let open = -1; // the place among those shown of the one that is large

  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = selects.filter((select) => select.value !== "");
    shown = cards.filter(
      (card) =>
        wanted.every((word) => card.text.includes(word)) &&
        chosen.every((select) => card.settings.get(select.dataset.setting) === select.value),
    );
    const those = new Set(shown);
    for (const card of cards) card.item.hidden = !those.has(card);
    find("none").hidden = shown.length > 0;
    find("count").textContent = shown.length < cards.length ? `${shown.length} of ${cards.length}` : "";
  };

  const enlarge = (place) => {
    const card = shown[place];
    if (!card) return;
    open = place;
    const thumbnail = card.item.querySelector("img");
    find("small-only").hidden = true;
    large.classList.toggle("small", thumbnail !== null && thumbnail.classList.contains("small"));
    large.alt = thumbnail ? thumbnail.alt : "";
    large.onerror = () => {
      large.onerror = null;
      find("small-only").hidden = false;
      if (thumbnail) large.src = thumbnail.src;
      else large.removeAttribute("src");
    };
    large.src = card.link.href;
    find("viewer-title").textContent = card.item.querySelector(".title").textContent;
    const all = [...card.item.querySelectorAll("dl div"), ...document.querySelectorAll("#common div")];
    find("facts").replaceChildren(...all.map((row) => row.cloneNode(true)));
    find("place").textContent = `${place + 1} of ${shown.length}`;
    find("file").textContent = card.name;
    find("file").href = card.link.href;
    find("before").disabled = place === 0;
    find("after").disabled = place === shown.length - 1;
    if (!viewer.open) viewer.showModal();
  };

  // Focus the picture this many rows below and columns to the right of the one that has it.
  const move = (down, right) => {
    const place = shown.findIndex((card) => card.link === document.activeElement);
    const top = shown.length > 0 ? shown[0].item.offsetTop : 0;
    const across = Math.max(1, shown.findIndex((card) => card.item.offsetTop !== top));
    const next = shown[place < 0 ? 0 : place + down * across + right];
    if (next) next.link.focus();
    return next !== undefined;
  };

  const inViewer = {
    ArrowLeft: () => enlarge(open - 1),
    ArrowRight: () => enlarge(open + 1),
    ArrowUp: () => enlarge(open - 1),
    ArrowDown: () => enlarge(open + 1),
    Home: () => enlarge(0),
    End: () => enlarge(shown.length - 1),
  };
  const onPage = {
    ArrowLeft: () => move(0, -1),
    ArrowRight: () => move(0, 1),
    ArrowUp: () => move(-1, 0),
    ArrowDown: () => move(1, 0),
    "/": () => words.focus(),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const isTyping = event.target instanceof Element && event.target.matches("input, select");
    if (isTyping && event.key === "Escape" && event.target === words) {
      words.value = "";
      filter();
      words.blur();
      return;
    }
    const isInGrid = document.activeElement instanceof Element && document.activeElement.closest(".card") !== null;
    const keys = viewer.open ? inViewer : onPage;
    const isScrolling = !viewer.open && !isInGrid && (event.key === "ArrowUp" || event.key === "ArrowDown");
    if (isTyping || isScrolling || !Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });

  find("cards").addEventListener("click", (event) => {
    const item = event.target.closest(".card");
    if (!event.target.closest("a") || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    enlarge(shown.findIndex((card) => card.item === item));
  });
  find("before").addEventListener("click", () => enlarge(open - 1));
  find("after").addEventListener("click", () => enlarge(open + 1));
  find("close").addEventListener("click", () => viewer.close());
  large.parentElement.addEventListener("click", () => viewer.close());
  viewer.addEventListener("close", () => {
    large.onerror = null;
    large.removeAttribute("src");
    if (shown[open]) shown[open].link.focus();
  });
  words.addEventListener("input", filter);
  for (const select of selects) select.addEventListener("change", filter);
  find("zoom").addEventListener("input", (event) => {
    document.body.style.setProperty("--tile", `${event.target.value}rem`);
  });
  for (const part of document.querySelectorAll(".tools, .keys")) part.hidden = false;
  filter();
})();
