// Explorers of defectbook: a page brings its numbers and pictures, this brings them alive. No framework, no network, no kernel.
// Every number shown was counted by Python; here integers are only divided (see defectbook.practice.explorers).
(() => {
  if (window.defectbookExplorers) return window.defectbookExplorers();

  const one = (node, what) => node.querySelector(what);
  const all = (node, what) => [...node.querySelectorAll(what)];
  const ratio = (part, whole) => (whole ? (part / whole).toFixed(3) : "–");
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  // A range input that tells `show` its place, and is told in words what a place means.
  function slider(root, show) {
    const range = one(root, "input[type=range]");
    const go = (place) => {
      range.value = clamp(place, +range.min, +range.max);
      range.setAttribute("aria-valuetext", show(+range.value));
    };
    range.addEventListener("input", () => go(+range.value));
    all(root, "button[data-by]").forEach((button) => button.addEventListener("click", () => go(+range.value + +button.dataset.by)));
    all(root, "button[data-to]").forEach((button) => button.addEventListener("click", () => go(+button.dataset.to)));
    go(+range.value);
    return go;
  }

  // The pointer, held down on a picture (or, where `hovering`, just over it), as a share of its width.
  function follow(node, hovering, moved) {
    const tell = (event) => {
      const box = node.getBoundingClientRect();
      moved(clamp((event.clientX - box.left) / box.width, 0, 1));
    };
    node.addEventListener("pointerdown", (event) => {
      node.setPointerCapture(event.pointerId);
      tell(event);
    });
    node.addEventListener("pointermove", (event) => (event.buttons || (hovering && event.pointerType === "mouse")) && tell(event));
  }

  const say = (root, values) => Object.entries(values).forEach(([name, words]) => (one(root, `[data-say="${name}"]`).textContent = words));

  const current = (rows, place) => rows.forEach((row, number) => (number === place ? row.setAttribute("aria-current", "true") : row.removeAttribute("aria-current")));

  // -- threshold: pixels of level k and above are defective at step k ------------------------------------------------------------
  function threshold(root, data) {
    const picture = one(root, ".dbx-levels"), [width, height] = [picture.naturalWidth, picture.naturalHeight];
    const canvas = document.createElement("canvas"), pencil = canvas.getContext("2d", { willReadFrequently: true });
    [canvas.width, canvas.height] = [width, height];
    pencil.drawImage(picture, 0, 0);
    const levels = pencil.getImageData(0, 0, width, height).data.filter((_, place) => place % 4 === 0);
    const sheet = one(root, "canvas"), still = one(root, ".dbx-still");
    let step = data.start;

    function draw() {
      const scale = Math.max(1, Math.round((sheet.clientWidth * (window.devicePixelRatio || 1)) / width));
      [sheet.width, sheet.height] = [width * scale, height * scale];
      const path = new Path2D(), inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && levels[y * width + x] > step;
      for (let y = 0; y <= height; y++) {
        for (let x = 0; x <= width; x++) {
          const here = inside(x, y);
          if (here !== inside(x - 1, y)) path.moveTo(x * scale, y * scale), path.lineTo(x * scale, (y + 1) * scale);
          if (here !== inside(x, y - 1)) path.moveTo(x * scale, y * scale), path.lineTo((x + 1) * scale, y * scale);
        }
      }
      const pen = sheet.getContext("2d");
      pen.lineCap = "round";
      for (const [thick, colour] of [[3, "rgba(0,0,0,.7)"], [1.6, "#e69f00"]]) {
        [pen.lineWidth, pen.strokeStyle] = [(thick * sheet.width) / (sheet.clientWidth || sheet.width), colour];
        pen.stroke(path);
      }
    }
    still.hidden = true;
    sheet.hidden = false;
    slider(root, (place) => {
      step = place;
      const tp = data.tp[step], fp = data.fp[step], fn = data.positives - tp;
      const words = { threshold: data.thresholds[step], dice: ratio(2 * tp, 2 * tp + fp + fn), precision: ratio(tp, tp + fp), recall: ratio(tp, tp + fn),
        iou: ratio(tp, tp + fp + fn), called: (tp + fp).toLocaleString("en") };
      say(root, words);
      draw();
      return `threshold ${words.threshold}: Dice ${words.dice}, precision ${words.precision}, recall ${words.recall}`;
    });
    all(root, "input[type=checkbox]").forEach((box) => {
      const layer = one(root, `.dbx-${box.name}`), turn = () => (layer.hidden = !box.checked);
      box.addEventListener("change", turn);
      turn();
    });
    new ResizeObserver(draw).observe(sheet);
  }

  // -- slide: the first picture up to the place, the second from there -----------------------------------------------------------
  function slide(root) {
    const stage = one(root, ".dbx-stage"), names = all(stage, "img").map((image) => image.dataset.name);
    stage.classList.add("dbx-over");
    const go = slider(root, (place) => {
      stage.style.setProperty("--place", `${place}%`);
      return `${place} % ${names[0]}, ${100 - place} % ${names[1]}`;
    });
    follow(stage, false, (share) => go(Math.round(100 * share)));
  }

  // -- clicks: the same object clicked by several sessions; marks and dots are in the page, and are shown up to the place --------
  function clicks(root, data) {
    const range = one(root, "input[type=range]"), most = +range.max, button = one(root, ".dbx-play"), rows = all(root, "tbody tr");
    const boards = all(root, ".dbx-session").map((node) => [node, one(node, ".dbx-mask"), all(node, ".dbx-mark")]);
    let clock = null;
    const go = slider(root, (place) => {
      current(rows, place - 1);
      return `click ${place}: ` + data.sessions.map((session, number) => {
        const [node, mask, marks] = boards[number], made = marks.length, shown = Math.min(place, made), iou = shown ? session.iou[shown - 1] : "–";
        mask.hidden = !shown;
        if (shown) mask.src = session.masks[shown - 1];
        [...marks, ...all(root, `[data-session="${number}"]`)].forEach((mark, count) => {
          mark.setAttribute("visibility", count % made < shown ? "visible" : "hidden");
          mark.classList.toggle("dbx-last", count % made === shown - 1);
        });
        say(node, { click: `${shown} of ${made}`, where: shown ? session.where[shown - 1] : "–", iou });
        return `${session.name} IoU ${iou}${place > made ? ", ended" : ""}`;
      }).join(", ");
    });
    const stop = () => {
      clearInterval(clock);
      clock = null;
      button.textContent = "Play";
    };
    button.addEventListener("click", () => {
      if (clock) return stop();
      if (+range.value >= most) go(0);
      button.textContent = "Stop";
      clock = setInterval(() => (+range.value >= most ? stop() : go(+range.value + 1)), 900);
    });
    range.addEventListener("input", stop);
    all(root, "button[data-by]").forEach((other) => other.addEventListener("click", stop));
  }

  // -- steps: one picture and one row of numbers at a time ----------------------------------------------------------------------
  function steps(root, data) {
    const picture = one(root, ".dbx-frame"), rows = all(root, "tbody tr");
    slider(root, (place) => {
      picture.src = data.frames[place];
      picture.alt = data.alts[place];
      current(rows, place);
      say(root, { words: data.words[place] });
      return data.words[place];
    });
  }

  // -- curves: what each method finds within a budget of false alarms -----------------------------------------------------------
  function curves(root, data) {
    const line = one(root, ".dbx-budget"), [left, top, width, height] = data.box, last = data.budgets.length - 1;
    const dots = data.methods.map((_, number) => one(root, `[data-dot="${number}"]`));
    const go = slider(root, (place) => {
      const x = left + (width * place) / last;
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      line.setAttribute("visibility", "visible");
      say(root, { budget: data.budgets[place] });
      return `at most ${data.budgets[place]}: ` + data.methods.map((method, number) => {
        const [fpr, tpr, threshold] = [method.x[place], method.y[place], method.thresholds[place]];
        dots[number].setAttribute("visibility", "visible");
        dots[number].setAttribute("transform", `translate(${left + (width * fpr) / data.limit} ${top + height * (1 - tpr)})`);
        say(one(root, `[data-method="${number}"]`), { fpr, tpr, threshold });
        return `${method.name} ${data.name} ${tpr}`;
      }).join(", ");
    });
    const picture = one(root, "svg"), whole = picture.viewBox.baseVal.width;
    follow(picture, true, (share) => go(Math.round((clamp(share * whole - left, 0, width) / width) * last)));
  }

  const kinds = { threshold, slide, clicks, steps, curves };
  const start = () => all(document, "figure.dbx:not([data-live])").forEach((root) => {
    const source = one(root, "script[type='application/json']");
    if (!source) return; // the page is still being read
    root.dataset.live = "starting";
    const data = JSON.parse(source.textContent);
    Promise.all(all(root, "img").map((image) => image.decode().catch(() => null))).then(() => {
      all(root, ".dbx-controls").forEach((node) => (node.hidden = false));
      all(root, "details").forEach((node) => (node.open = false));
      kinds[root.dataset.kind](root, data);
      root.dataset.live = "yes";
    }).catch((error) => {
      console.error(error);
      root.dataset.live = "failed"; // what the page shows without JavaScript stays
    });
  });
  window.defectbookExplorers = start;
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  start();
})();
