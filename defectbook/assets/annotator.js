// The view of defectbook.practice.annotator: draws what the session says, and tells it what was done. It decides nothing.

const COLOURS = ["#ff5a5f", "#2ec4f1", "#ffc93c", "#2fd08c", "#b983ff", "#ff924c", "#7bdff2", "#f15bb5", "#b8e04a"];
const HELP = [
  ["click", "on the defect"], ["right click, or shift", "not the defect"], ["enter", "accept"], ["U", "undo"], ["1 to 9", "class"],
  ["G", "good: no defect"], ["Q, B, E", "click, paint, erase"], ["[ ]", "brush size"], ["wheel, + −", "zoom"], ["space or middle button", "move"],
  ["F", "whole image"], ["H", "hide masks"], ["← →", "other images"],
];

function make(kind, className, parent, text) {
  const node = document.createElement(kind);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

class View {
  constructor(model, el) {
    this.model = model;
    this.marks = new Map();
    this.state = null;
    this.image = null;
    this.tool = "click";
    this.brush = 9;
    this.opacity = 0.4;
    this.hidden = false;
    this.byView = true;
    this.scale = 1;
    this.left = this.top = 0;
    this.pending = new Map();
    this.requests = 0;
    this.queue = Promise.resolve();
    this.drag = null;
    this.cursor = null;
    this.layer = document.createElement("canvas");
    this.build(el);
    this.receive = (message, buffers) => {
      this.queue = this.queue.then(() => this.show(message, buffers)).catch((error) => {
        console.error(error);
        this.pending.clear();
        this.say(`this page cannot show the answer: ${error}; reload it`, "error");
      });
    };
    model.on("msg:custom", this.receive);
    this.watch = new ResizeObserver(() => this.resize());
    this.watch.observe(this.stage);
    this.ask("ready");
  }

  dispose() {
    this.model.off("msg:custom", this.receive);
    this.watch.disconnect();
    clearInterval(this.clock);
  }

  // -- the parts --------------------------------------------------------------------------------------------------------------
  build(el) {
    const root = this.root = make("div", "dbk", el);
    root.tabIndex = 0;
    root.dataset.lmSuppressShortcuts = "true"; // or JupyterLab would turn cells into headings on 1 to 6
    const bar = make("div", "dbk-bar", root);
    const pages = make("div", "dbk-group", bar);
    this.previous = this.button(pages, "‹", "previous image (←)", () => this.ask("go", { step: -1 }));
    this.title = make("span", "dbk-title", pages);
    this.next = this.button(pages, "›", "next image (→); an open mask is accepted", () => this.ask("go", { step: 1 }));
    this.chips = make("div", "dbk-group dbk-chips", bar);
    const tools = make("div", "dbk-group dbk-tools", bar);
    this.tools = {};
    for (const [name, label, tip] of [["click", "Click", "point at the defect (Q)"], ["add", "Paint", "add with the brush (B)"],
                                      ["erase", "Erase", "remove with the brush (E)"]])
      this.tools[name] = this.button(tools, label, tip, () => this.choose(name));
    const acts = make("div", "dbk-group", bar);
    this.undo = this.button(acts, "Undo", "take the last step back (U)", () => this.ask("undo"));
    this.good = this.button(acts, "No defect", "this image is good (G)", () => this.ask("normal", { on: !this.state?.normal }));
    this.accept = this.button(acts, "Accept", "accept the open mask (enter)", () => this.ask("accept"));
    this.accept.classList.add("dbk-main-button");

    const body = make("div", "dbk-body", root);
    this.stage = make("div", "dbk-stage", body);
    this.stage.style.height = `${this.model.get("height")}px`;
    this.canvas = make("canvas", "dbk-canvas", this.stage);
    this.notice = make("div", "dbk-notice", this.stage);
    this.zoomLabel = make("button", "dbk-zoom", this.stage);
    this.zoomLabel.title = "show the whole image (F)";
    this.zoomLabel.onclick = () => this.fit();
    const side = make("div", "dbk-side", body);
    make("div", "dbk-head", side, "Masks");
    this.list = make("div", "dbk-list", side);
    this.total = make("div", "dbk-total", side);
    this.brushSlider = this.slider(side, "Brush", "width of the brush in pixels ([ and ])", 1, 99, this.brush, (value) => { this.brush = value; this.draw(); });
    this.opacitySlider = this.slider(side, "Fill", "how opaque masks are", 0, 100, 100 * this.opacity, (value) => { this.opacity = value / 100; this.draw(); });
    this.learns = this.check(side, "The model learns", "adapt the decoder to what you click and accept", true, (on) => this.ask("adapt", { on }));
    this.viewed = this.check(side, "It sees my view", "zoom in, and the model sees only that part, larger", true, (on) => {
      this.byView = on;
      this.tellView();
    });
    this.exporter = this.button(side, "Export", "write MVTec folders and COCO JSON", () => this.ask("export"));
    const line = make("div", "dbk-line", root);
    this.line = make("span", "dbk-said", line);
    this.line.setAttribute("role", "status");
    const help = make("details", "dbk-help", line);
    make("summary", "", help, "Keys");
    const table = make("div", "dbk-keys", help);
    for (const [key, what] of HELP) {
      make("b", "", table, key);
      make("span", "", table, what);
    }
    this.listen();
  }

  button(parent, label, tip, act) {
    const node = make("button", "dbk-button", parent, label);
    node.type = "button";
    node.title = tip;
    node.setAttribute("aria-label", tip);
    node.onclick = () => { act(); this.root.focus({ preventScroll: true }); };
    return node;
  }

  slider(parent, label, tip, low, high, value, act) {
    const box = make("label", "dbk-slider", parent);
    make("span", "", box, label);
    box.title = tip;
    const node = make("input", "", box);
    Object.assign(node, { type: "range", min: low, max: high, value });
    node.oninput = () => act(Number(node.value));
    node.onchange = () => this.root.focus({ preventScroll: true });
    return node;
  }

  check(parent, label, tip, on, act) {
    const box = make("label", "dbk-check", parent);
    const node = make("input", "", box);
    Object.assign(node, { type: "checkbox", checked: on });
    node.onchange = () => { act(node.checked); this.root.focus({ preventScroll: true }); };
    make("span", "", box, label);
    box.title = tip;
    return node;
  }

  // -- what people do ---------------------------------------------------------------------------------------------------------
  listen() {
    const canvas = this.canvas;
    canvas.addEventListener("pointerdown", (event) => this.press(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.release(event));
    canvas.addEventListener("pointercancel", () => { this.drag = null; this.draw(); });
    canvas.addEventListener("pointerleave", () => { this.cursor = null; this.draw(); });
    canvas.addEventListener("contextmenu", (event) => { event.preventDefault(); event.stopPropagation(); });
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !this.root.contains(document.activeElement)) return; // a page that is scrolled past is not zoomed
      event.preventDefault();
      const [x, y] = this.spot(event);
      this.zoom(Math.exp(-event.deltaY * (event.ctrlKey ? 0.01 : 0.0016)), x, y);
    }, { passive: false });
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.root.addEventListener("keyup", (event) => {
      if (event.key === " ") { this.space = false; this.cursors(); }
    });
  }

  spot(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  onImage([x, y]) {
    return [(x - this.left) / this.scale, (y - this.top) / this.scale];
  }

  press(event) {
    this.root.focus({ preventScroll: true });
    event.preventDefault();
    const at = this.spot(event);
    if (event.button === 1 || (event.button === 0 && this.space)) {
      this.drag = { kind: "move", at, left: this.left, top: this.top };
    } else if (!this.image) {
      return;
    } else if (this.tool === "click" && (event.button === 0 || event.button === 2)) {
      const [x, y] = this.onImage(at), negative = event.button === 2 || event.shiftKey || event.ctrlKey || event.altKey || event.metaKey;
      this.ask("click", { x: Math.floor(x), y: Math.floor(y), positive: !negative, view: this.view() });
      return;
    } else if (event.button === 0 || event.button === 2) {
      this.drag = { kind: "paint", add: this.tool === "add" && event.button === 0 && !event.shiftKey, points: [this.onImage(at)] };
    }
    if (this.drag) this.canvas.setPointerCapture(event.pointerId);
    this.cursors();
    this.draw();
  }

  move(event) {
    const at = this.cursor = this.spot(event);
    if (this.drag?.kind === "move") {
      this.left = this.drag.left + at[0] - this.drag.at[0];
      this.top = this.drag.top + at[1] - this.drag.at[1];
    } else if (this.drag?.kind === "paint") {
      this.drag.points.push(this.onImage(at));
    } else if (this.tool === "click") {
      return;
    }
    this.draw();
  }

  release() {
    const drag = this.drag;
    this.drag = null;
    this.cursors();
    if (drag?.kind === "move") this.tellView();
    if (drag?.kind === "paint") {
      this.stroke = drag; // stays on the screen until the mask comes back
      this.ask("stroke", { points: drag.points.map(([x, y]) => [x - 0.5, y - 0.5]), width: Math.max(1, this.brush), add: drag.add });
    }
    this.draw();
  }

  key(event) {
    if (event.target.tagName === "INPUT" && event.target.type === "range" && event.key.startsWith("Arrow")) return;
    if (event.altKey || (event.ctrlKey || event.metaKey) && event.key.toLowerCase() !== "z") return;
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const digit = "123456789".indexOf(key), classes = this.state?.classes ?? [];
    const acts = {
      Enter: () => this.ask("accept"), u: () => this.ask("undo"), z: () => this.ask("undo"), Backspace: () => this.ask("undo"),
      ArrowRight: () => this.ask("go", { step: 1 }), ArrowLeft: () => this.ask("go", { step: -1 }), g: () => this.good.onclick(),
      q: () => this.choose("click"), b: () => this.choose("add"), e: () => this.choose("erase"), f: () => this.fit(),
      h: () => { this.hidden = !this.hidden; this.draw(); }, "[": () => this.resizeBrush(-2), "]": () => this.resizeBrush(2),
      "+": () => this.zoom(1.25), "=": () => this.zoom(1.25), "-": () => this.zoom(0.8),
      " ": () => { this.space = true; this.cursors(); },
    };
    const act = digit >= 0 && digit < classes.length ? () => this.ask("class", { name: classes[digit] }) : acts[key];
    if (!act || (event.repeat && !"[]+-=u".includes(key))) {
      if (act) event.preventDefault();
      return;
    }
    if ((key === "Enter" || key === " ") && ["BUTTON", "SUMMARY"].includes(event.target.tagName)) return; // a button that has the focus
    event.preventDefault();
    event.stopPropagation();
    act();
  }

  choose(tool) {
    this.tool = tool;
    for (const [name, node] of Object.entries(this.tools)) node.classList.toggle("dbk-on", name === tool);
    this.cursors();
    this.draw();
  }

  resizeBrush(step) {
    this.brush = Math.min(99, Math.max(1, this.brush + step));
    this.brushSlider.value = this.brush;
    this.draw();
  }

  cursors() {
    this.canvas.style.cursor = this.drag?.kind === "move" ? "grabbing" : this.space ? "grab" : this.tool === "click" ? "crosshair" : "none";
  }

  // -- where we look ----------------------------------------------------------------------------------------------------------
  resize() {
    const ratio = window.devicePixelRatio || 1, { clientWidth: width, clientHeight: height } = this.stage;
    if (!width || !height) return;
    this.canvas.width = this.layer.width = Math.round(width * ratio);
    this.canvas.height = this.layer.height = Math.round(height * ratio);
    this.ratio = ratio;
    if (this.fitted) this.fit(); else this.draw();
  }

  fit() {
    if (!this.image) return;
    const { clientWidth: width, clientHeight: height } = this.stage, { width: w, height: h } = this.state;
    this.scale = Math.min(width / w, height / h);
    this.left = (width - w * this.scale) / 2;
    this.top = (height - h * this.scale) / 2;
    this.fitted = true;
    this.tellView();
    this.draw();
  }

  zoom(factor, x = this.stage.clientWidth / 2, y = this.stage.clientHeight / 2) {
    if (!this.image) return;
    const { clientWidth: width, clientHeight: height } = this.stage;
    const whole = Math.min(width / this.state.width, height / this.state.height);
    const scale = Math.min(40, Math.max(whole, this.scale * factor));
    if (scale <= whole * 1.001) return this.fit();
    this.left = x - (x - this.left) * scale / this.scale;
    this.top = y - (y - this.top) * scale / this.scale;
    this.scale = scale;
    this.fitted = false;
    this.tellView();
    this.draw();
  }

  // The part of the image on the screen, or null for all of it.
  view() {
    if (!this.byView || !this.image) return null;
    const { clientWidth: width, clientHeight: height } = this.stage, { width: w, height: h } = this.state;
    const box = [-this.left / this.scale, -this.top / this.scale, (width - this.left) / this.scale, (height - this.top) / this.scale];
    const [x0, y0, x1, y1] = [Math.max(0, box[0]), Math.max(0, box[1]), Math.min(w, box[2]), Math.min(h, box[3])];
    return x0 <= 0 && y0 <= 0 && x1 >= w && y1 >= h ? null : x1 > x0 && y1 > y0 ? [x0, y0, x1, y1] : null;
  }

  tellView() {
    clearTimeout(this.telling);
    this.telling = setTimeout(() => this.ask("look", { view: this.view() }), 250);
  }

  // -- to the kernel and back -------------------------------------------------------------------------------------------------
  ask(act, values = {}) {
    const id = `${++this.requests}`;
    if (act !== "look") this.pending.set(id, { at: performance.now(), act });
    this.model.send({ do: act, id, ...values });
    if (this.clock === undefined) this.clock = setInterval(() => this.waiting(), 500);
  }

  waiting() {
    const oldest = [...this.pending.values()][0];
    const seconds = oldest ? (performance.now() - oldest.at) / 1000 : 0;
    this.root.classList.toggle("dbk-waiting", seconds > 0.5);
    // A page can be ready before its connection is; asking for the state twice does no harm.
    if (oldest?.act === "ready" && seconds > 3 * (this.readied ?? 1)) {
      this.readied = (this.readied ?? 1) + 1;
      this.model.send({ do: "ready", id: [...this.pending.keys()][0] });
    }
    if (seconds > 8)
      this.say("No answer from the kernel yet. If it was stopped, or if this goes on, run the cell again: everything up to here is on the disk.", "error");
    if (!oldest) { clearInterval(this.clock); this.clock = undefined; }
  }

  async show(message, buffers) {
    if (message.kind !== "state") return;
    const old = this.state, state = this.state = message;
    const bytes = (index) => new Blob([buffers[index]]);
    const other = !old || old.index !== state.index;
    if (state.picture !== null) this.image = await createImageBitmap(bytes(state.picture));
    if (state.problem) this.image = null;
    const marks = new Map();
    for (const mark of state.marks) {
      const before = other ? undefined : this.marks.get(mark.number);
      mark.mask = mark.png !== null ? await createImageBitmap(bytes(mark.png)) : mark.kept ? before?.mask : undefined;
      mark.box = mark.box ?? before?.box;
      mark.tinted = mark.png === null && before?.colour === this.colour(mark.cls) ? before?.tinted : undefined;
      mark.colour = this.colour(mark.cls);
      marks.set(mark.number, mark);
    }
    this.marks = marks;
    this.stroke = null;
    if (other || state.picture !== null) {
      if (other || !old) this.fitted = true;
      this.resize();
    } else this.draw();
    this.panels();
    const asked = this.pending.get(message.reply);
    this.pending.delete(message.reply);
    if (message.text || asked?.act !== "look") this.say(message.text, message.level);
    if (asked && ["click", "stroke", "undo"].includes(asked.act)) {
      const taken = Math.round(performance.now() - asked.at);
      this.root.dataset.milliseconds = `${taken}`;
      this.root.dataset.answered = message.reply;
      if (!message.text) this.say(`mask after ${taken} ms`, "quiet");
    }
    if (asked) this.root.dataset.done = asked.act;
    this.waiting();
  }

  say(text, level) {
    this.line.textContent = text || "";
    this.line.className = `dbk-said dbk-${level || "quiet"}`;
    if (text) this.line.title = text;
  }

  colour(cls) {
    return COLOURS[Math.max(0, this.state.classes.indexOf(cls)) % COLOURS.length];
  }

  panels() {
    const { state } = this, marks = [...this.marks.values()], open = marks.find((mark) => mark.open);
    this.title.textContent = "";
    make("b", "", this.title, state.name);
    make("span", "", this.title, ` ${state.index + 1} / ${state.count}`);
    this.title.title = `${state.name}, ${state.width} × ${state.height} px`;
    this.previous.disabled = state.index === 0;
    this.next.disabled = state.index === state.count - 1;
    this.chips.textContent = "";
    state.classes.forEach((name, index) => {
      const chip = this.button(this.chips, "", `class ${name}${index < 9 ? ` (${index + 1})` : ""}`, () => this.ask("class", { name }));
      chip.className = `dbk-chip${name === state.cls ? " dbk-on" : ""}`;
      make("i", "", chip).style.background = this.colour(name);
      make("span", "", chip, name);
      if (index < 9) make("kbd", "", chip, `${index + 1}`);
    });
    this.good.classList.toggle("dbk-on", state.normal);
    this.accept.disabled = !open;
    this.undo.disabled = !marks.length;
    this.learns.checked = state.adapting;
    this.learns.parentNode.style.display = state.adapts ? "" : "none";
    this.notice.textContent = state.problem || (state.normal ? "no defect" : "");
    this.notice.className = `dbk-notice${state.problem ? " dbk-problem" : ""}`;
    this.list.textContent = "";
    if (!marks.length) make("div", "dbk-none", this.list, state.problem ? "" : "none yet: click on a defect");
    for (const mark of marks) {
      const row = make("div", `dbk-row${mark.open ? " dbk-open" : ""}`, this.list);
      make("i", "", row).style.background = mark.colour;
      const words = make("div", "dbk-words", row);
      make("span", "dbk-name", words, mark.cls);
      const made = [`${mark.clicks} click${mark.clicks === 1 ? "" : "s"}`];
      if (mark.strokes) made.push(`${mark.strokes} stroke${mark.strokes === 1 ? "" : "s"}`);
      make("small", "", words, `${made.join(", ")} · ${mark.area.toLocaleString("en")} px`);
      this.button(row, "×", `delete this mask of class ${mark.cls}`, () => this.ask("delete", { number: mark.number })).classList.add("dbk-delete");
    }
    this.total.textContent = state.total;
  }

  // -- drawing ----------------------------------------------------------------------------------------------------------------
  draw() {
    if (this.drawing) return;
    this.drawing = requestAnimationFrame(() => { this.drawing = 0; this.paint(); });
  }

  paint() {
    const context = this.canvas.getContext("2d"), ratio = this.ratio || 1;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.zoomLabel.style.display = this.image ? "" : "none";
    if (!this.image) return;
    const place = [ratio * this.scale, 0, 0, ratio * this.scale, ratio * this.left, ratio * this.top];
    const { width, height } = this.state;
    context.setTransform(...place);
    context.imageSmoothingEnabled = this.scale < 3;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.image, 0, 0, width, height);
    if (!this.hidden) for (const mark of this.marks.values()) this.paintMark(context, mark, place);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const open = [...this.marks.values()].find((mark) => mark.open);
    if (open && !this.hidden) this.paintClicks(context, open);
    const drag = this.drag?.kind === "paint" ? this.drag : this.stroke;
    if (drag) this.paintStroke(context, drag);
    if (this.tool !== "click" && this.cursor && this.drag?.kind !== "move") this.paintBrush(context);
    this.zoomLabel.textContent = this.fitted ? "whole image" : `${Math.round(100 * this.scale)} %`;
  }

  tint(mark) {
    if (!mark.tinted) {
      mark.tinted = new OffscreenCanvas(mark.mask.width, mark.mask.height);
      const context = mark.tinted.getContext("2d");
      context.drawImage(mark.mask, 0, 0);
      context.globalCompositeOperation = "source-in";
      context.fillStyle = mark.colour;
      context.fillRect(0, 0, mark.mask.width, mark.mask.height);
    }
    return mark.tinted;
  }

  paintMark(context, mark, place) {
    if (!mark.mask) return;
    const [x, y] = mark.box, tinted = this.tint(mark), { width, height } = tinted;
    context.imageSmoothingEnabled = false;
    context.globalAlpha = this.opacity;
    context.drawImage(tinted, x, y, width, height);
    context.globalAlpha = 1;
    // The outline: the mask, moved in all directions, less the mask. It has one width at every zoom and follows the pixels.
    const layer = this.layer.getContext("2d"), reach = (mark.open ? 2 : 1.25) * this.ratio;
    layer.setTransform(1, 0, 0, 1, 0, 0);
    layer.globalCompositeOperation = "source-over";
    layer.clearRect(0, 0, this.layer.width, this.layer.height);
    layer.imageSmoothingEnabled = false;
    for (let step = 0; step < 8; step++) {
      const angle = step * Math.PI / 4;
      layer.setTransform(place[0], 0, 0, place[3], place[4] + reach * Math.cos(angle), place[5] + reach * Math.sin(angle));
      layer.drawImage(tinted, x, y, width, height);
    }
    layer.setTransform(...place);
    layer.globalCompositeOperation = "destination-out";
    layer.drawImage(tinted, x, y, width, height);
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.shadowColor = "black"; // a red line shows on red, too
    context.shadowBlur = 2.5 * this.ratio;
    context.drawImage(this.layer, 0, 0);
    context.restore();
  }

  paintClicks(context, mark) {
    const [x0, y0, x1, y1] = mark.frame ?? [0, 0, this.state.width, this.state.height];
    if (x0 > 0 || y0 > 0 || x1 < this.state.width || y1 < this.state.height) {
      context.setLineDash([5, 4]);
      context.strokeStyle = "rgba(255,255,255,.8)";
      context.lineWidth = 1;
      context.strokeRect(this.left + x0 * this.scale, this.top + y0 * this.scale, (x1 - x0) * this.scale, (y1 - y0) * this.scale);
      context.setLineDash([]);
    }
    for (const [x, y, positive] of mark.points) {
      const [u, v] = [this.left + (x + 0.5) * this.scale, this.top + (y + 0.5) * this.scale];
      context.beginPath();
      context.arc(u, v, 6, 0, 7);
      context.fillStyle = positive ? "#12a150" : "#d7263d";
      context.fill();
      context.lineWidth = 1.5;
      context.strokeStyle = "white";
      context.stroke();
      context.beginPath();
      context.moveTo(u - 3, v);
      context.lineTo(u + 3, v);
      if (positive) { context.moveTo(u, v - 3); context.lineTo(u, v + 3); }
      context.stroke();
    }
  }

  paintStroke(context, drag) {
    const open = [...this.marks.values()].find((mark) => mark.open);
    context.beginPath();
    drag.points.forEach(([x, y], index) => context[index ? "lineTo" : "moveTo"](this.left + x * this.scale, this.top + y * this.scale));
    const [x, y] = drag.points[0];
    if (drag.points.length === 1) context.lineTo(this.left + x * this.scale + 0.01, this.top + y * this.scale);
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = Math.max(1, this.brush * this.scale);
    context.strokeStyle = drag.add ? open?.colour ?? this.colour(this.state.cls) : "#111";
    context.globalAlpha = Math.max(0.25, this.opacity);
    context.stroke();
    context.globalAlpha = 1;
    context.lineCap = "butt";
  }

  paintBrush(context) {
    for (const [colour, width] of [["rgba(0,0,0,.6)", 3], [this.tool === "add" ? "white" : "#ffb3b3", 1.25]]) {
      context.beginPath();
      context.arc(...this.cursor, Math.max(2, this.brush * this.scale / 2), 0, 7);
      context.lineWidth = width;
      context.strokeStyle = colour;
      context.stroke();
    }
  }
}

export default {
  render({ model, el }) {
    const view = new View(model, el);
    view.choose("click");
    return () => view.dispose();
  },
};
