// Points on a circle, to drag, or to turn with the arrow keys: the front half of CirclePoints in widgets.py.
const SIDE = 260, MIDDLE = SIDE / 2, RADIUS = 92; // pixels
const PAUSE = 300; // milliseconds between two values that a drag sends, since each draws a chart
const STEPS = { ArrowLeft: 1, ArrowUp: 1, ArrowRight: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 }; // degrees

function draw(kind, parent, attributes) {
  const shape = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
  parent.append(shape);
  return shape;
}

function place(degrees, radius) {
  const angle = (degrees * Math.PI) / 180;
  return { x: MIDDLE + radius * Math.cos(angle), y: MIDDLE - radius * Math.sin(angle) };
}

function render({ model, el }) {
  const canvas = draw("svg", el, { width: SIDE, height: SIDE });
  draw("circle", canvas, { cx: MIDDLE, cy: MIDDLE, r: RADIUS, fill: "none", stroke: "currentColor", opacity: 0.3 });
  const middle = { x: MIDDLE, y: MIDDLE, "text-anchor": "middle", fill: "currentColor" };
  const reading = draw("text", canvas, middle);
  reading.textContent = "drag a point";
  let sent = 0;

  // A caption is a square, named inside the circle, and a picture a disc, named outside.
  const points = model.get("names").map((name, number) => {
    const caption = name.startsWith("c");
    const point = draw("g", canvas, { role: "slider", tabindex: 0, "aria-label": name, cursor: "grab" });
    point.style.touchAction = "none"; // a finger drags the point, not the page
    const look = caption ? { x: -7, y: -7, width: 14, height: 14 } : { r: 8 };
    draw(caption ? "rect" : "circle", point, { ...look, fill: model.get("colours")[number] });
    const word = draw("text", point, { "text-anchor": "middle", "dominant-baseline": "central", fill: "currentColor" });
    word.textContent = name;
    return { point, word, caption };
  });

  function show() {
    model.get("value").forEach((degrees, number) => {
      const { point, word, caption } = points[number];
      const here = place(degrees, RADIUS);
      const label = place(degrees, RADIUS + (caption ? -22 : 22));
      point.setAttribute("transform", `translate(${here.x} ${here.y})`);
      word.setAttribute("x", label.x - here.x);
      word.setAttribute("y", label.y - here.y);
      point.setAttribute("aria-valuenow", degrees);
    });
  }

  function turn(number, degrees, last) {
    const value = [...model.get("value")];
    value[number] = (Math.round(degrees) + 360) % 360;
    model.set("value", value);
    reading.textContent = `${model.get("names")[number]}: ${value[number]}°`;
    if (last || performance.now() - sent > PAUSE) {
      sent = performance.now();
      model.save_changes();
    }
  }

  points.forEach(({ point }, number) => {
    const follow = (event) => {
      const box = canvas.getBoundingClientRect();
      const [x, y] = [event.clientX - box.left - MIDDLE, box.top + MIDDLE - event.clientY];
      turn(number, (Math.atan2(y, x) * 180) / Math.PI, event.type === "pointerup");
    };
    point.addEventListener("pointerdown", (event) => point.setPointerCapture(event.pointerId));
    point.addEventListener("pointermove", (event) => point.hasPointerCapture(event.pointerId) && follow(event));
    point.addEventListener("pointerup", follow);
    point.addEventListener("keydown", (event) => {
      if (!(event.key in STEPS)) return;
      event.preventDefault();
      event.stopPropagation(); // a notebook would go to another cell
      turn(number, model.get("value")[number] + STEPS[event.key], true);
    });
  });
  model.on("change:value", show);
  show();
  return () => model.off("change:value", show);
}

export default { render };
