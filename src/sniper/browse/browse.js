"use strict";
// The page of `sniper browse`: tiles of one image on a canvas, with its objects, detections and chips.

const by = id => document.getElementById(id);
const canvas = by("view"), context = canvas.getContext("2d");
const MAX_TILES = 200, MAX_LOADS = 4, MAX_ZOOM = 64, MAX_LISTED = 300, POLL = 500;
const STATUS = ["valid", "out of range", "ignored"];
const CLASSES_LISTED = 12;

let data;                                  // facts of the data set
let chips = {state: "choosing"};           // facts of the chips
let kept = [];                             // indices of the images that the filter keeps
let image = null;                          // facts of the image that is shown, with its index
let view = {x: 0, y: 0, scale: 1};         // image pixel at the left upper corner; screen pixels per image pixel
let isFitted = true;
let selected = null;                       // index into `marks`
let chip = null;                           // index into image.chips
let marks = [];                            // boxes of the image: objects and detections
let hasOverview = false;
const shown = {objects: true, detections: true, chips: false, labels: true, kinds: {}, levels: {}};
const tiles = new Map();                   // by path: a bitmap, or null while it is loaded
const failed = new Set();
let loading = 0, drawn = 0, openings = 0, watches = 0, selections = 0;

async function get(path) {
  let response;
  try {
    response = await fetch(path);
  } catch {
    throw new Error("The connection to sniper browse is lost; is it still running?");
  }
  if (response.headers.get("Content-Type") === "image/png") return createImageBitmap(await response.blob());
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.problem);
  return answer;
}

function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

function say(text) {
  by("message").hidden = !text;
  by("message").textContent = text || "";
}

const plural = (count, one, many = one + "s") => `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
const sizeOf = box => Math.sqrt((box[2] - box[0]) * (box[3] - box[1]));
const number = text => text.trim() === "" ? null : Number(text.replace(",", "."));
const minScore = () => Number(by("score").value);
const isDetection = mark => mark.score !== undefined;

// What is on the image

function listMarks() {
  marks = [];
  const {objects, detections} = image;
  objects.boxes.forEach((box, i) => marks.push({box, label: objects.labels[i], crowd: objects.crowds[i], matched: objects.match_scores && objects.match_scores[i]}));
  if (detections) detections.boxes.forEach((box, i) => marks.push({box, label: detections.labels[i], score: detections.scores[i], match: detections.kinds[i]}));
}

function kindOf(mark) {
  if (isDetection(mark)) return mark.match;
  if (mark.crowd) return "crowd";
  if (!data.has_detections) return "class";
  return mark.matched !== null && mark.matched >= minScore() ? "detected" : "missed";
}

function colorOf(mark) {
  const kind = kindOf(mark);
  return kind === "class" ? data.colors.classes[mark.label % data.colors.classes.length] : data.colors[kind];
}

function nameOf(mark) {
  const name = data.classes[mark.label];
  if (isDetection(mark)) return `${name} ${mark.score.toFixed(2)}`;
  return mark.crowd ? `crowd: ${name}` : name;
}

// A box outside the filter is drawn faintly, so that the others stand out.
function fits(mark) {
  const label = by("class").value, least = number(by("at-least").value), below = number(by("below").value);
  const side = sizeOf(mark.box), level = chips.levels && by("level").value !== "" ? chips.levels[by("level").value] : null;
  return (label === "" || mark.label === Number(label)) && !(side < least) && !(below !== null && side >= below)
    && (level === null || side >= level.at_least && (level.below === null || side < level.below));
}

function isShown(mark) {
  if (isDetection(mark) && mark.score < minScore()) return false;
  if (!(isDetection(mark) ? shown.detections : shown.objects)) return false;
  return shown.kinds[kindOf(mark)] !== false;
}

const isChipShown = each => shown.chips && shown.levels[each.level] !== false
  && (by("level").value === "" || each.level === Number(by("level").value));

// Images

async function openImage(index, {keepsHash = false} = {}) {
  const opening = ++openings;
  const facts = await get(`image/${index}`);
  if (opening !== openings) return;
  const isSame = image !== null && image.index === index;
  image = Object.assign(facts, {index});
  if (!isSame) {
    selected = chip = null;
    isFitted = true;
    hasOverview = image.overview === null;
    say(image.problem && `This image cannot be shown. ${image.problem}`);
    by("progress").hidden = true;
    watchOverview(++watches);
  } else if (chip !== null && !(image.chips && image.chips[chip])) chip = null;
  if (!keepsHash) history.replaceState(null, "", `#${index + 1}`);
  by("name").textContent = image.name;
  by("sides").textContent = `${image.width.toLocaleString("en")} × ${image.height.toLocaleString("en")} px`;
  document.title = `${image.name} – ${data.name}`;
  listMarks();
  showPosition();
  update();
}

// Asking again and again keeps the server reading; it gives up soon after the page has left the image.
async function watchOverview(watch) {
  try {
    while (!image.problem && !hasOverview) {
      const {done} = await get(`overview/${image.index}`);
      if (watch !== watches) return;
      hasOverview = done >= 1;
      by("progress").hidden = hasOverview;
      by("progress").firstElementChild.textContent = `Reading the whole image once: ${Math.round(100 * done)} %. Zoomed in, it can be seen at once.`;
      by("progress").lastElementChild.value = done;
      if (hasOverview) return draw();
      await new Promise(resolve => setTimeout(resolve, POLL));
      if (watch !== watches) return;
    }
  } catch (error) {
    if (watch !== watches) return;
    by("progress").hidden = true;
    say(`This image cannot be shown. ${error.message}`);
  }
}

const rank = () => image === null ? -1 : kept.indexOf(image.index);

function showPosition() {
  const at = rank();
  by("position").value = at < 0 ? "–" : at + 1;
  by("total").textContent = `of ${kept.length.toLocaleString("en")}`;
  by("previous").disabled = at <= 0;
  by("next").disabled = at >= kept.length - 1;
}

function step(to) {
  if (!kept.length) return;
  openImage(kept[Math.min(Math.max(to, 0), kept.length - 1)]).catch(error => say(error.message));
}

async function applyFilter() {
  const selection = ++selections;
  const query = new URLSearchParams({
    kind: by("kind").value, class: by("class").value, level: by("level").value, name: by("file-name").value,
    at_least: by("at-least").value.replace(",", "."), below: by("below").value.replace(",", "."),
    min_score: data.has_detections ? by("score").value : "",
  });
  try {
    const {images} = await get(`select?${query}`);
    if (selection !== selections) return;
    kept = images;
    by("kept").textContent = kept.length === data.num_images ? plural(kept.length, "image") : `${kept.length.toLocaleString("en")} of ${plural(data.num_images, "image")}`;
    by("filter").querySelectorAll(":invalid").forEach(each => each.setCustomValidity(""));
    if (!kept.length) {
      openings++;
      watches++;
      image = null;
      marks = [];
      by("name").textContent = by("sides").textContent = "";
      by("progress").hidden = true;
      say("No image fits the filter.");
      showPosition();
      update();
    } else if (rank() < 0) await openImage(kept[0]);
    else { showPosition(); update(); }
  } catch (error) {
    by("kept").textContent = error.message;
  }
}

// The panel

function addRow(parent, {text, color, classes = "", count, isOn, onChange, indent = false}) {
  const box = make("input", {type: "checkbox", checked: isOn});
  box.addEventListener("change", () => { onChange(box.checked); update(); });
  const swatch = make("span", {className: `swatch ${classes}`});
  if (color) { swatch.style.borderColor = color; swatch.style.color = color; }
  parent.append(make("label", {className: `row${indent ? " indent" : ""}`}, box, ...(color ? [swatch] : []), make("span", {textContent: text}), make("b", {textContent: count})));
}

function showLegend() {
  const legend = by("legend"), focused = document.activeElement && document.activeElement.closest("#legend, #levels");
  const at = focused && [...focused.querySelectorAll("input")].indexOf(document.activeElement), where = focused && focused.id;
  const above = marks.filter(mark => !isDetection(mark) || mark.score >= minScore());
  const count = kind => above.filter(mark => kindOf(mark) === kind).length;
  const kindRow = (kind, text, classes) => addRow(legend, {text, classes, indent: true, color: data.colors[kind], count: count(kind).toLocaleString("en"),
    isOn: shown.kinds[kind] !== false, onChange: isOn => { shown.kinds[kind] = isOn; }});
  legend.replaceChildren();
  const objects = marks.filter(mark => !isDetection(mark)), crowds = count("crowd");
  addRow(legend, {text: data.has_detections ? "Objects, dashed" : "Objects", count: (objects.length - crowds).toLocaleString("en"), isOn: shown.objects, onChange: isOn => { shown.objects = isOn; }});
  if (data.has_detections) {
    kindRow("detected", "detected", "dashed");
    kindRow("missed", "missed", "dashed");
  } else {
    const counts = new Map();
    objects.filter(mark => !mark.crowd).forEach(mark => counts.set(mark.label, (counts.get(mark.label) || 0) + 1));
    [...counts].sort((a, b) => b[1] - a[1]).slice(0, CLASSES_LISTED).forEach(([label, number]) => {
      const swatch = make("span", {className: "swatch"});
      swatch.style.borderColor = data.colors.classes[label % data.colors.classes.length];
      legend.append(make("div", {className: "row indent"}, swatch, make("span", {textContent: data.classes[label]}), make("b", {textContent: number.toLocaleString("en")})));
    });
    if (counts.size > CLASSES_LISTED) legend.append(make("div", {className: "row indent note", textContent: `and ${plural(counts.size - CLASSES_LISTED, "more class", "more classes")}`}));
  }
  if (crowds) kindRow("crowd", "crowds, not counted", "dashed");
  if (data.has_detections) {
    addRow(legend, {text: "Detections, solid", count: ["true", "false", "ignored"].reduce((sum, kind) => sum + count(kind), 0).toLocaleString("en"), isOn: shown.detections, onChange: isOn => { shown.detections = isOn; }});
    kindRow("true", "true positives", "");
    kindRow("false", "false positives", "");
    if (count("ignored")) kindRow("ignored", "in crowds, not counted", "");
  }
  showLevels();
  if (where && at >= 0) { const input = by(where).querySelectorAll("input")[at]; if (input) input.focus(); }
  by("counts").textContent = image === null ? "" : `${image.name}: ${plural(objects.length - crowds, "object")}` + (data.has_detections
    ? `, ${count("missed")} missed, ${plural(count("true"), "true positive")}, ${plural(count("false"), "false positive")}` : "");
}

function showLevels() {
  const list = by("levels");
  list.replaceChildren();
  const notes = {
    choosing: "Choosing the chips …", none: "There is no object to learn from, so there are no chips.",
    failed: `Chips cannot be chosen: ${chips.problem}`,
    ready: chips.state === "ready" ? `${chips.is_suggested ? "The pyramid that suits these images" : "The pyramid of the experiment"}, ${chips.size} px chips.` : "",
  };
  by("chips-note").textContent = notes[chips.state];
  by("chips-row").hidden = chips.state !== "ready";
  by("chip").replaceChildren();
  if (chips.state !== "ready" || image === null || !image.chips) return;
  chips.levels.forEach((level, index) => addRow(list, {
    text: `${level.name}: ${level.sizes}`, classes: "filled", color: data.colors.levels[index % data.colors.levels.length], indent: true,
    count: image.chips.filter(each => each.level === index).length.toLocaleString("en"), isOn: shown.levels[index] !== false,
    onChange: isOn => { shown.levels[index] = isOn; if (chip !== null && !isChipShown(image.chips[chip])) chip = null; },
  }));
  if (image.num_chips > image.chips.length) list.append(make("p", {className: "note", textContent: `The ${plural(image.chips.length, "chip")} with the most valid objects, of ${image.num_chips.toLocaleString("en")}.`}));
  if (chip !== null) {
    const each = image.chips[chip], box = by("chip");
    box.append(make("div", {textContent: `${each.negative ? "Negative chip" : "Chip"} ${chip + 1} of ${image.chips.length}, level ${chips.levels[each.level].name}, scale ×${Number(each.scale.toPrecision(3))}`}));
    STATUS.forEach((text, status) => {
      const swatch = make("span", {className: "swatch"});
      swatch.style.borderColor = data.colors.status[status];
      box.append(make("div", {className: "row"}, swatch, make("span", {textContent: text}), make("b", {textContent: each.status.filter(value => value === status).length})));
    });
  } else if (shown.chips) list.append(make("p", {className: "note", textContent: "Click a chip, or press ], to see the boxes that it learns from."}));
}

function orderedMarks() {
  const order = {missed: 0, false: 1, true: 2, ignored: 4, class: 2, detected: 3, crowd: 5};
  return marks.map((mark, index) => ({mark, index})).filter(({mark}) => isShown(mark) && fits(mark))
    .sort((a, b) => order[kindOf(a.mark)] - order[kindOf(b.mark)] || (b.mark.score || 0) - (a.mark.score || 0) || a.index - b.index);
}

function showBoxes() {
  const list = by("boxes"), ordered = orderedMarks(), words = {missed: "missed", false: "false positive", true: "true positive", ignored: "in a crowd", detected: "detected"};
  list.replaceChildren(...ordered.slice(0, MAX_LISTED).map(({mark, index}) => {
    const swatch = make("span", {className: `swatch${isDetection(mark) || !data.has_detections && !mark.crowd ? "" : " dashed"}`});
    swatch.style.borderColor = colorOf(mark);
    const word = words[kindOf(mark)], side = sizeOf(mark.box);
    const button = make("button", {type: "button"}, swatch, make("span", {textContent: nameOf(mark), title: word || ""}),
      make("span", {textContent: `${word ? word + ", " : ""}${side < 10 ? side.toFixed(1) : Math.round(side)} px`}));
    button.setAttribute("aria-current", index === selected);
    button.dataset.index = index;
    return make("li", {}, button);
  }));
  if (ordered.length > MAX_LISTED) list.append(make("li", {className: "note", textContent: `and ${ordered.length - MAX_LISTED} more`}));
  if (!ordered.length) list.append(make("li", {className: "note", textContent: "none"}));
}

function update() {
  by("score-value").textContent = minScore().toFixed(3).replace(/0$/, "");
  by("show-chips").checked = shown.chips;
  by("show-labels").checked = shown.labels;
  showLegend();
  showBoxes();
  draw();
}

// The view

function bounds() {
  const {width, height} = canvas.getBoundingClientRect();
  return {width: Math.max(width, 1), height: Math.max(height, 1)};
}

const fitScale = () => { const {width, height} = bounds(); return Math.min(width / image.width, height / image.height) * 0.98; };

function fit() {
  if (image === null) return;
  const {width, height} = bounds(), scale = fitScale();
  view = {scale, x: image.width / 2 - width / scale / 2, y: image.height / 2 - height / scale / 2};
  isFitted = true;
  draw();
}

function zoomTo(scale, at) {
  if (image === null) return;
  const {width, height} = bounds();
  at = at || {x: width / 2, y: height / 2};
  scale = Math.min(Math.max(scale, Math.min(fitScale(), 1) / 2), MAX_ZOOM);
  view = {scale, x: view.x + at.x / view.scale - at.x / scale, y: view.y + at.y / view.scale - at.y / scale};
  isFitted = false;
  clampView();
  draw();
}

function move(dx, dy) {
  view.x += dx / view.scale;
  view.y += dy / view.scale;
  isFitted = false;
  clampView();
  draw();
}

// Some of the image stays in sight.
function clampView() {
  const {width, height} = bounds();
  view.x = Math.min(Math.max(view.x, -width / view.scale / 2), image.width - width / view.scale / 2);
  view.y = Math.min(Math.max(view.y, -height / view.scale / 2), image.height - height / view.scale / 2);
}

function showBox(box, share) {
  const {width, height} = bounds();
  const scale = Math.min(share * Math.min(width / (box[2] - box[0]), height / (box[3] - box[1])), 16);
  view = {scale, x: (box[0] + box[2]) / 2 - width / scale / 2, y: (box[1] + box[3]) / 2 - height / scale / 2};
  isFitted = false;
}

function select(index) {
  selected = index;
  if (index !== null) { chip = null; showBox(marks[index].box, Math.min(view.scale * sizeOf(marks[index].box) / bounds().width > 0.1 ? 0.3 : 0.2, 1)); }
  update();
  const current = document.querySelector("#boxes [aria-current=true]");
  if (current) current.scrollIntoView({block: "nearest"});
}

function stepBox(by) {
  const ordered = orderedMarks();
  if (!ordered.length) return;
  const at = ordered.findIndex(({index}) => index === selected);
  select(ordered[at < 0 ? (by > 0 ? 0 : ordered.length - 1) : (at + by + ordered.length) % ordered.length].index);
}

function selectChip(index) {
  chip = index;
  selected = null;
  if (index !== null) { shown.chips = true; showBox(image.chips[index].window, 0.9); }
  update();
}

function stepChip(by) {
  if (image === null || !image.chips || !image.chips.length) return;
  shown.chips = true;
  const visible = image.chips.map((_, index) => index).filter(index => isChipShown(image.chips[index]));
  if (!visible.length) return update();
  const at = visible.indexOf(chip);
  selectChip(visible[at < 0 ? (by > 0 ? 0 : visible.length - 1) : (at + by + visible.length) % visible.length]);
}

// Drawing

function draw() {
  if (!drawn) drawn = requestAnimationFrame(() => { drawn = 0; render(); });
}

function render() {
  const {width, height} = bounds(), ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
  }
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  by("scale").textContent = "";
  if (image === null) return;
  if (isFitted) {
    const scale = fitScale();
    view = {scale, x: image.width / 2 - width / scale / 2, y: image.height / 2 - height / scale / 2};
  }
  const percent = 100 * view.scale * ratio;
  by("scale").textContent = `${percent < 10 ? Number(percent.toPrecision(2)) : Math.round(percent)} %`;
  if (!image.problem) drawTiles(width, height, ratio);
  context.strokeStyle = "#8888";
  context.lineWidth = 1;
  context.strokeRect(...toScreen([0, 0, image.width, image.height]));
  if (shown.chips) drawChips(width, height);
  if (chip === null) drawMarks(width, height);
}

const toScreen = box => [(box[0] - view.x) * view.scale, (box[1] - view.y) * view.scale, (box[2] - box[0]) * view.scale, (box[3] - box[1]) * view.scale];

// The tiles of a zoom that can be seen, those in the middle first.
function visibleTiles(zoom, width, height) {
  const [across, down] = image.zooms[zoom], unit = data.tile;
  const fx = image.width / across, fy = image.height / down;
  const first = [view.x / fx / unit, view.y / fy / unit].map(at => Math.max(Math.floor(at), 0));
  const last = [Math.min(Math.floor((view.x + width / view.scale) / fx / unit), Math.ceil(across / unit) - 1),
    Math.min(Math.floor((view.y + height / view.scale) / fy / unit), Math.ceil(down / unit) - 1)];
  const list = [];
  for (let row = first[1]; row <= last[1]; row++) for (let column = first[0]; column <= last[0]; column++) {
    const box = [column * unit * fx, row * unit * fy, Math.min((column + 1) * unit, across) * fx, Math.min((row + 1) * unit, down) * fy];
    list.push({path: `tile/${image.index}/${zoom}/${column}/${row}`, box, away: Math.hypot(column - (first[0] + last[0]) / 2, row - (first[1] + last[1]) / 2)});
  }
  return list.sort((a, b) => a.away - b.away);
}

function drawTiles(width, height, ratio) {
  const wanted = Math.min(Math.max(Math.floor(Math.log2(1 / (view.scale * ratio)) + 1e-6), 0), image.zooms.length - 1);
  context.imageSmoothingEnabled = view.scale * ratio < 2;
  context.imageSmoothingQuality = "high";
  // Coarser tiles are there already, from views of more of the image; finer ones are drawn over them.
  for (let zoom = image.zooms.length - 1; zoom >= wanted; zoom--) {
    for (const {path, box} of visibleTiles(zoom, width, height)) {
      const bitmap = tiles.get(path);
      if (!bitmap) continue;
      tiles.delete(path);
      tiles.set(path, bitmap);             // the least recently drawn is the first
      drawTile(bitmap, box, ratio);
    }
  }
  const coarsest = image.zooms.length - 1;
  const order = wanted < coarsest ? [coarsest, wanted] : [wanted];
  for (const zoom of order) {
    if (image.overview !== null && zoom >= image.overview && !hasOverview) continue;
    for (const {path} of visibleTiles(zoom, width, height)) {
      if (loading >= MAX_LOADS) return;
      if (!tiles.has(path) && !failed.has(path)) load(path);
    }
  }
}

function drawTile(bitmap, box, ratio) {
  const [x, y, width, height] = toScreen(box).map(value => value * ratio);
  const left = Math.round(x), top = Math.round(y);     // whole pixels of the screen, so that no seam is seen
  context.drawImage(bitmap, left / ratio, top / ratio, (Math.round(x + width) - left) / ratio, (Math.round(y + height) - top) / ratio);
}

async function load(path) {
  const index = image.index;
  loading++;
  tiles.set(path, null);
  try {
    tiles.set(path, await get(path));
    for (const [old, bitmap] of tiles) {
      if (tiles.size <= MAX_TILES) break;
      if (bitmap) { bitmap.close(); tiles.delete(old); }
    }
  } catch (error) {
    tiles.delete(path);
    failed.add(path);
    if (image && image.index === index) say(`This image cannot be shown. ${error.message}`);
  } finally {
    loading--;
    draw();
  }
}

function drawChips(width, height) {
  if (!image.chips) return;
  image.chips.forEach((each, index) => {
    if (!isChipShown(each) || index === chip) return;
    const [x, y, w, h] = toScreen(each.window);
    if (x > width || y > height || x + w < 0 || y + h < 0) return;
    context.globalAlpha = chip === null ? 1 : 0.35;
    outline(x, y, w, h, data.colors.levels[each.level % data.colors.levels.length], 2, each.negative ? [8, 5] : []);
    context.globalAlpha = 0.08;
    context.fillStyle = data.colors.levels[each.level % data.colors.levels.length];
    if (chip === null) context.fillRect(x, y, w, h);
    context.globalAlpha = 1;
  });
  if (chip === null) return;
  const each = image.chips[chip], [x, y, w, h] = toScreen(each.window);
  context.fillStyle = "#0009";
  context.beginPath();
  context.rect(0, 0, width, height);
  context.rect(x, y, w, h);
  context.fill("evenodd");
  outline(x, y, w, h, data.colors.levels[each.level % data.colors.levels.length], 3);
  const order = each.boxes.map((_, index) => index).sort((a, b) => each.status[b] - each.status[a]);  // valid ones on top
  const labels = [];
  order.forEach(index => {
    const box = toScreen(each.boxes[index]), color = data.colors.status[each.status[index]];
    outline(...box, color, 2);
    labels.push({box, color, text: `${data.classes[each.labels[index]]}, ${STATUS[each.status[index]]}`});
  });
  drawLabels(labels.reverse(), width, height);
}

function drawMarks(width, height) {
  const visible = marks.map((mark, index) => ({mark, index, box: toScreen(mark.box)}))
    .filter(({mark, box: [x, y, w, h]}) => isShown(mark) && x < width && y < height && x + w > 0 && y + h > 0);
  const weight = ({mark, index}) => (index === selected ? 8 : 0) + (fits(mark) ? 4 : 0) + ({missed: 2, false: 2, true: 1, class: 1}[kindOf(mark)] || 0);
  visible.sort((a, b) => weight(a) - weight(b));
  for (const {mark, index, box} of visible) {
    const isChosen = index === selected;
    context.globalAlpha = fits(mark) || isChosen ? 1 : 0.3;
    const dash = data.has_detections && !isDetection(mark) || mark.crowd ? [6, 4] : [];
    // A detected object is a little larger, so that the dashes are not hidden by its detection.
    const grown = kindOf(mark) === "detected" && Math.max(box[2], box[3]) >= 10 ? [box[0] - 3, box[1] - 3, box[2] + 6, box[3] + 6] : box;
    outline(...grown, colorOf(mark), isChosen ? 4 : 2, dash);
    context.globalAlpha = 1;
  }
  drawLabels(visible.filter(({mark, index}) => fits(mark) && kindOf(mark) !== "detected" || index === selected)
    .map(({mark, box}) => ({box, color: colorOf(mark), text: nameOf(mark)})).reverse(), width, height);
}

// A dark line below the coloured one keeps it visible on every ground. Tiny boxes are dots.
function outline(x, y, width, height, color, thickness, dash = []) {
  if (Math.max(width, height) < 10) {
    context.fillStyle = color;
    context.fillRect(x + width / 2 - 2, y + height / 2 - 2, 4, 4);
    return;
  }
  context.setLineDash([]);
  context.strokeStyle = "#0009";
  context.lineWidth = thickness + 2;
  context.strokeRect(x, y, width, height);
  context.setLineDash(dash);
  context.strokeStyle = color;
  context.lineWidth = thickness;
  context.strokeRect(x, y, width, height);
  context.setLineDash([]);
}

// Labels above the boxes, without those that would cover an earlier one; none where the boxes are tiny.
function drawLabels(labels, width, height) {
  if (!shown.labels) return;
  const taken = [];
  context.font = "600 12px system-ui, sans-serif";
  context.textBaseline = "middle";
  for (const {box: [x, y, w, h], color, text} of labels.slice(0, 400)) {
    if (Math.max(w, h) < 14) continue;
    const wide = context.measureText(text).width + 8;
    const left = Math.min(Math.max(x - 1, 0), Math.max(width - wide, 0)), top = y >= 18 ? y - 18 : Math.min(y + h + 2, height - 17);
    if (taken.some(other => left < other[0] + other[2] && other[0] < left + wide && top < other[1] + 17 && other[1] < top + 17)) continue;
    taken.push([left, top, wide]);
    context.fillStyle = color;
    context.fillRect(left, top, wide, 17);
    context.fillStyle = brightness(color) > 110 ? "#000" : "#fff";
    context.fillText(text, left + 4, top + 9);
  }
}

function brightness(color) {
  const [red, green, blue] = [1, 3, 5].map(start => parseInt(color.slice(start, start + 2), 16));
  return 0.299 * red + 0.587 * green + 0.114 * blue;
}

// Input

function clickAt(x, y) {
  if (image === null) return;
  const at = {x: view.x + x / view.scale, y: view.y + y / view.scale}, slack = 4 / view.scale;
  const holds = box => at.x >= box[0] - slack && at.y >= box[1] - slack && at.x <= box[2] + slack && at.y <= box[3] + slack;
  const smallest = list => list.sort((a, b) => sizeOf(a.box) - sizeOf(b.box))[0];
  const box = chip === null && smallest(marks.map((mark, index) => ({index, box: mark.box, mark})).filter(each => isShown(each.mark) && holds(each.box)));
  const window = shown.chips && image.chips && smallest(image.chips.map((each, index) => ({index, box: each.window, each})).filter(({each, box}) => isChipShown(each) && holds(box)));
  if (box) { selected = box.index; chip = null; }
  else { selected = null; chip = window && window.index !== chip ? window.index : null; }
  update();
  const current = document.querySelector("#boxes [aria-current=true]");
  if (current && matchMedia("(min-width: 50rem)").matches) current.scrollIntoView({block: "nearest"});
}

function listenToPointers() {
  const pointers = new Map();
  let travelled = 0, pinch = null;
  const place = event => { const {left, top} = canvas.getBoundingClientRect(); return {x: event.clientX - left, y: event.clientY - top}; };
  canvas.addEventListener("pointerdown", event => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, place(event));
    if (pointers.size === 1) travelled = 0;
    pinch = null;
    canvas.classList.add("dragging");
  });
  canvas.addEventListener("pointermove", event => {
    const before = pointers.get(event.pointerId);
    if (!before || image === null) return;
    const now = place(event);
    travelled += Math.hypot(now.x - before.x, now.y - before.y);
    pointers.set(event.pointerId, now);
    if (pointers.size === 1 && travelled > 4) move(before.x - now.x, before.y - now.y);
    if (pointers.size === 2) {
      const [a, b] = [...pointers.values()], apart = Math.hypot(a.x - b.x, a.y - b.y), middle = {x: (a.x + b.x) / 2, y: (a.y + b.y) / 2};
      if (pinch) {
        move(pinch.middle.x - middle.x, pinch.middle.y - middle.y);
        zoomTo(view.scale * apart / pinch.apart, middle);
      }
      pinch = {apart, middle};
      travelled = Infinity;
    }
  });
  const end = event => {
    if (!pointers.delete(event.pointerId)) return;
    if (event.type === "pointerup" && !pointers.size && travelled <= 4) clickAt(place(event).x, place(event).y);
    pinch = null;
    if (!pointers.size) canvas.classList.remove("dragging");
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("wheel", event => {
    event.preventDefault();
    const lines = event.deltaMode === 1 ? 16 : 1;
    zoomTo(view.scale * Math.pow(2, -Math.min(Math.max(event.deltaY * lines, -200), 200) / 250), place(event));
  }, {passive: false});
}

function toggle(name) {
  shown[name] = !shown[name];
  if (name === "chips") chip = null;
  update();
}

const KEYS = {
  ArrowRight: () => step(rank() + 1), ArrowLeft: () => step(rank() - 1), Home: () => step(0), End: () => step(kept.length - 1),
  n: () => stepBox(1), p: () => stepBox(-1), "]": () => stepChip(1), "[": () => stepChip(-1),
  "+": () => zoomTo(view.scale * 1.5), "=": () => zoomTo(view.scale * 1.5), "-": () => zoomTo(view.scale / 1.5), "−": () => zoomTo(view.scale / 1.5),
  0: fit, 1: () => zoomTo(1 / (window.devicePixelRatio || 1)),
  w: () => move(0, -120), a: () => move(-120, 0), s: () => move(0, 120), d: () => move(120, 0),
  o: () => toggle("objects"), x: () => toggle("detections"), c: () => toggle("chips"), l: () => toggle("labels"),
  f: () => by("kind").focus(), g: () => by("position").focus(), "?": () => by("help").showModal(),
};

document.addEventListener("keydown", event => {
  if (!data || event.ctrlKey || event.metaKey || event.altKey || by("help").open) return;
  const target = event.target, takesText = target.matches("select, input:not([type=checkbox])");
  if (event.key === "Escape") {
    if (takesText) canvas.focus();
    selected = chip = null;
    update();
    return;
  }
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (takesText || !(key in KEYS) || image === null && "np][+=-−01wasd".includes(key)) return;
  event.preventDefault();
  KEYS[key]();
});

function listen() {
  listenToPointers();
  new ResizeObserver(draw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  by("previous").addEventListener("click", () => step(rank() - 1));
  by("next").addEventListener("click", () => step(rank() + 1));
  by("zoom-in").addEventListener("click", () => zoomTo(view.scale * 1.5));
  by("zoom-out").addEventListener("click", () => zoomTo(view.scale / 1.5));
  by("zoom-fit").addEventListener("click", fit);
  by("zoom-one").addEventListener("click", KEYS[1]);
  by("help-open").addEventListener("click", KEYS["?"]);
  by("position").addEventListener("focus", event => event.target.select());
  by("position").addEventListener("change", event => {
    const to = parseInt(event.target.value, 10);
    if (Number.isFinite(to)) step(to - 1);
    showPosition();
  });
  by("position").addEventListener("keydown", event => { if (event.key === "Enter") canvas.focus(); });
  by("boxes").addEventListener("click", event => { const button = event.target.closest("button"); if (button) select(Number(button.dataset.index)); });
  by("show-labels").addEventListener("change", () => toggle("labels"));
  by("show-chips").addEventListener("change", () => toggle("chips"));
  let waiting = 0;
  const later = () => { clearTimeout(waiting); waiting = setTimeout(applyFilter, 200); };
  by("filter").addEventListener("input", later);
  by("filter").addEventListener("submit", event => { event.preventDefault(); applyFilter(); });
  by("filter").addEventListener("reset", () => setTimeout(applyFilter));
  by("score").addEventListener("input", () => { update(); later(); });
  window.addEventListener("hashchange", () => {
    const index = parseInt(location.hash.slice(1), 10) - 1;
    if (index >= 0 && index < data.num_images && !(image && image.index === index)) openImage(index).catch(error => say(error.message));
  });
}

async function watchChips() {
  for (;;) {
    chips = await get("chips");
    if (chips.state !== "choosing") break;
    showLevels();
    await new Promise(resolve => setTimeout(resolve, POLL));
  }
  if (chips.state === "ready") {
    chips.levels.forEach((level, index) => by("level").append(make("option", {value: index, textContent: `${level.name}: ${level.sizes}`})));
    if (image !== null) return openImage(image.index, {keepsHash: true});
  }
  showLevels();
}

async function start() {
  data = await get("dataset");
  document.title = by("dataset").textContent = data.name;
  data.classes.forEach((name, label) => by("class").append(make("option", {value: label, textContent: name})));
  by("filter").querySelectorAll("[data-needs]").forEach(option => { option.hidden = option.disabled = !data.has_detections; });
  by("score-row").hidden = !data.has_detections;
  by("score").value = data.min_score;
  by("left-out").hidden = !data.left_out.length;
  by("left-out").querySelector("ul").append(...data.left_out.map(line => make("li", {textContent: line})));
  listen();
  const index = parseInt(location.hash.slice(1), 10) - 1;
  if (index >= 0 && index < data.num_images) await openImage(index);
  await applyFilter();
  await watchChips();
}

start().catch(error => say(error.message));
