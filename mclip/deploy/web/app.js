/* The page: a student of mclip that looks at pictures and reads sentences inside the browser.

   Pictures and sentences take the same way to numbers as in mclip/deploy/reader.py. The examples of golden.json, which
   PyTorch answered when the student was exported, are computed again at the start, so that a device that computes
   something else is found. Exported functions are those that the tests compare with Python. */

const GRAPHS = {
  int8: ["model/image-int8.onnx", "model/text-int8.onnx"],
  float32: ["float32/image.onnx", "float32/text.onnx"],
};
const [KIND, VERSION] = ["mclip.export", 2]; // of the manifest, as in reader.py
const LONGEST = 8; // a picture may be this many times as long as it is wide; of a longer one only the middle is used
const MOST_PIXELS = 16e6; // what the smallest canvas of today's phones holds; a larger photograph is drawn smaller
const LEVELS = 2; // how far a pixel, 0..255, may be off: browsers round once more where a picture is transparent
const BEST = 24; // photographs that a search shows

/* A failure that is told to the person in front of the page, as a sentence. */
class Problem extends Error {}

const $ = (id) => document.getElementById(id);

function report(error) {
  $("problem").hidden = !error;
  if (!error) return;
  $("problem").textContent = error instanceof Problem ? error.message : `This should not have happened: ${error}`;
  if (!(error instanceof Problem)) console.error(error);
}

/* A handler of an event whose failures are told. */
const telling = (handler) => async (event) => {
  report(null);
  try {
    await handler(event);
  } catch (error) {
    report(error);
  }
};

/* ---- files ---- */

async function fetchBytes(name) {
  let response;
  try {
    response = await fetch(new URL(name, import.meta.url));
  } catch {
    throw new Problem(`${name} could not be loaded: there is no network, and no copy of it was kept.`);
  }
  if (!response.ok) throw new Problem(`${name} could not be loaded (${response.status}); export the folder again.`);
  return new Uint8Array(await response.arrayBuffer());
}

/* JSON that was packed with gzip. Some hosts unpack such files themselves, so its first two bytes are looked at. */
async function fetchPacked(name) {
  const bytes = await fetchBytes(name);
  let body = new Blob([bytes]).stream();
  if (bytes[0] === 0x1f && bytes[1] === 0x8b) body = body.pipeThrough(new DecompressionStream("gzip"));
  return { value: await new Response(body).json(), bytes: bytes.length };
}

const fromBase64 = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

/* ---- pictures ---- */

/* Left, top, width and height of the part that is used, as `middle` of the Python reader. */
function middle(width, height) {
  const [left, top] = [width, height].map((side) =>
    Math.floor(Math.max(0, side - LONGEST * Math.min(width, height)) / 2),
  );
  return [left, top, width - 2 * left, height - 2 * top];
}

const scratch = document.createElement("canvas");

/* RGBA pixels of a bitmap or a video frame. What is transparent becomes white, as on a page. */
function readPixels(source, fullWidth, fullHeight) {
  const [left, top, partWidth, partHeight] = middle(fullWidth, fullHeight);
  const shrink = Math.min(1, Math.sqrt(MOST_PIXELS / (partWidth * partHeight)));
  const [width, height] = [partWidth, partHeight].map((side) => Math.max(1, Math.floor(side * shrink)));
  if (scratch.width !== width || scratch.height !== height) Object.assign(scratch, { width, height });
  const context = scratch.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(source, left, top, partWidth, partHeight, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

/* A file as a bitmap: upright as the camera's note in EXIF says, its numbers untouched by colour profiles. */
async function openPicture(blob, name = "This file") {
  try {
    return await createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Problem(`${name} is no picture that this browser can read.`);
  }
}

/* Keys' cubic filter with a = -0.5. */
function bicubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return 0;
}

/* For each of the places first..end of a side that is resized: where its pixels begin, and their weights.

   They are Pillow's, to the bit: the filter widens as the picture shrinks, and weights are integers of 22 bits. */
function resampling(from, to, first, end) {
  const scale = from / to;
  const width = Math.max(scale, 1);
  const places = [];
  for (let place = first; place < end; place++) {
    const centre = (place + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - 2 * width + 0.5));
    const stop = Math.min(from, Math.trunc(centre + 2 * width + 0.5));
    const shares = [];
    for (let x = start; x < stop; x++) shares.push(bicubic((x - centre + 0.5) * (1 / width)));
    const sum = shares.reduce((a, b) => a + b, 0);
    const weights = shares.map((share) => Math.trunc((share / sum) * 2 ** 22 + (share < 0 ? -0.5 : 0.5)));
    places.push({ start, weights: Int32Array.from(weights) });
  }
  return places;
}

const toLevel = (sum) => Math.min(255, Math.max(0, sum >> 22));

/* Python's round: halves go to the even neighbour. */
function roundHalfEven(x) {
  const low = Math.floor(x);
  if (x - low !== 0.5) return Math.round(x);
  return low % 2 ? low + 1 : low;
}

/* The centre of RGBA pixels, `size` x `size` levels of red, green and blue, after the shortest side is resized.

   First along rows, then along columns, with levels rounded between, as Pillow does. Only what the centre needs is
   computed. */
export function squareLevels({ data, width, height }, size) {
  const shortest = Math.min(width, height);
  const [newWidth, newHeight] = [width, height].map((side) => Math.floor((size * side) / shortest));
  const [left, top] = [newWidth, newHeight].map((side) => roundHalfEven((side - size) / 2));
  const columns = resampling(width, newWidth, left, left + size);
  const rows = resampling(height, newHeight, top, top + size);
  const firstRow = rows[0].start;
  const lastRow = rows[size - 1].start + rows[size - 1].weights.length;
  const narrow = new Uint8Array((lastRow - firstRow) * size * 3);
  let at = 0;
  for (let y = firstRow; y < lastRow; y++) {
    for (const { start, weights } of columns) {
      let [red, green, blue] = [2 ** 21, 2 ** 21, 2 ** 21];
      let pixel = 4 * (y * width + start);
      for (let i = 0; i < weights.length; i++, pixel += 4) {
        red += data[pixel] * weights[i];
        green += data[pixel + 1] * weights[i];
        blue += data[pixel + 2] * weights[i];
      }
      narrow[at++] = toLevel(red);
      narrow[at++] = toLevel(green);
      narrow[at++] = toLevel(blue);
    }
  }
  const levels = new Uint8Array(size * size * 3);
  const stride = size * 3;
  at = 0;
  for (const { start, weights } of rows) {
    for (let x = 0; x < stride; x++) {
      let sum = 2 ** 21;
      let level = (start - firstRow) * stride + x;
      for (let i = 0; i < weights.length; i++, level += stride) sum += narrow[level] * weights[i];
      levels[at++] = toLevel(sum);
    }
  }
  return levels;
}

/* Levels (S, S, 3) -> what the image graph reads, (3, S, S): 0..1, then each channel standardised. */
function standardise(levels, { size, mean, std }) {
  const area = size * size;
  const input = new Float32Array(3 * area);
  for (let channel = 0; channel < 3; channel++) {
    for (let i = 0; i < area; i++) {
      input[channel * area + i] = (levels[3 * i + channel] / 255 - mean[channel]) / std[channel];
    }
  }
  return input;
}

/* ---- the student ---- */

/* The tokenizer of the folder. The library cuts nothing off, so that is done here, before the end token. */
async function loadTokenizer() {
  const [{ Tokenizer }, { value, bytes }] = await Promise.all([
    import("./vendor/tokenizers.min.mjs"),
    fetchPacked("model/tokenizer.json.gz"),
  ]);
  for (const step of value.pre_tokenizer.pretokenizers) {
    // JavaScript has no (?i) for the rest of a pattern. Texts are in lower case already, so nothing is lost.
    if (step.pattern) step.pattern.Regex = step.pattern.Regex.replace("(?i)", "");
  }
  const [tokenizer, longest] = [new Tokenizer(value, {}), value.truncation.max_length];
  const tokenize = (text) => {
    const { ids } = tokenizer.encode(text);
    return ids.length > longest ? [...ids.slice(0, longest - 1), ids.at(-1)] : ids;
  };
  return { tokenize, bytes };
}

/* What all forms share, loaded once. */
async function loadShared() {
  const [tokenizer, golden, ...texts] = await Promise.all([
    loadTokenizer(),
    fetchPacked("model/golden.json.gz"),
    fetchBytes("model/preprocess.json"),
    fetchBytes("model/manifest.json"),
  ]);
  const [settings, manifest] = texts.map((bytes) => JSON.parse(new TextDecoder().decode(bytes)));
  if (manifest.kind !== KIND || manifest.version !== VERSION) {
    const written = `version ${manifest.version} of ${manifest.kind}`;
    throw new Problem(`The model was written by ${written}, and this page reads version ${VERSION} of ${KIND}; export again.`);
  }
  return { tokenize: tokenizer.tokenize, bytes: tokenizer.bytes, golden: golden.value, settings, manifest };
}

/* Refuse a graph that is not the exported one. A page over plain http cannot compute hashes, so it takes the graph. */
async function checkGraph(name, bytes, manifest) {
  if (!crypto.subtle) return;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  const hash = [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  if (hash !== manifest.files[name.split("/").at(-1)]?.sha256) {
    throw new Problem(`${name} is not the file that was exported (its SHA-256 differs); copy the folder again.`);
  }
}

/* ONNX Runtime: on WebAssembly with SIMD, with threads where the page is isolated; or on WebGPU. */
async function loadRuntime(webgpu) {
  if (typeof WebAssembly !== "object") {
    throw new Problem("This browser has no WebAssembly, on which the student computes; use a newer one.");
  }
  const folder = webgpu ? "./vendor/webgpu/" : "./vendor/";
  const ort = await import(`${folder}${webgpu ? "ort.webgpu.min.mjs" : "ort.wasm.min.mjs"}`);
  ort.env.wasm.wasmPaths = new URL(folder, import.meta.url).href;
  ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  return ort;
}

let shared = null;
let student = null;
let queue = Promise.resolve();

/* One computation at a time: the runtime cannot begin a second one while the first is under way. */
function inTurn(job) {
  const result = queue.then(job);
  queue = result.catch(() => {});
  return result;
}

async function loadStudent(form, webgpu) {
  shared ??= loadShared();
  shared.catch(() => (shared = null));
  const [common, ort, ...graphs] = await Promise.all([shared, loadRuntime(webgpu), ...GRAPHS[form].map(fetchBytes)]);
  await Promise.all(graphs.map((graph, i) => checkGraph(GRAPHS[form][i], graph, common.manifest)));
  const providers = { executionProviders: [webgpu ? "webgpu" : "wasm"] };
  let sessions;
  try {
    const [image, text] = graphs;
    sessions = [await ort.InferenceSession.create(image, providers), await ort.InferenceSession.create(text, providers)];
  } catch (error) {
    throw new Problem(`This browser cannot compute the ${form} student (${error.message}).`);
  }
  const bytes = common.bytes + graphs.reduce((sum, graph) => sum + graph.length, 0);
  const name = `${common.manifest.model.sha256}/${form}`;
  return { ...common, ort, form, webgpu, image: sessions[0], text: sessions[1], bytes, name, sentences: new Map() };
}

/* An input of one half -> its embedding of length 1, and the milliseconds that it took. */
function run(session, feed) {
  return inTurn(async () => {
    const start = performance.now();
    const { embeddings } = await session.run(feed);
    return { embedding: Float32Array.from(embeddings.data), ms: performance.now() - start };
  });
}

function embedLevels(levels) {
  const { size } = student.settings;
  const input = new student.ort.Tensor("float32", standardise(levels, student.settings), [1, 3, size, size]);
  return run(student.image, { images: input });
}

/* A sentence alone, so that in int8, where a batch shares its range, the answer does not depend on its neighbours. */
async function embedText(text) {
  const start = performance.now();
  const ids = student.tokenize(text);
  const tokens = new student.ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
  const { embedding } = await run(student.text, { tokens });
  return { embedding, ids, ms: performance.now() - start };
}

/* Embeddings of sentences; each is computed once and kept. */
async function embedSentences(sentences) {
  const kept = student.sentences; // another student may come meanwhile
  for (const sentence of sentences) {
    if (!kept.has(sentence)) kept.set(sentence, await embedText(sentence));
  }
  return sentences.map((sentence) => kept.get(sentence).embedding);
}

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

/* A file, bitmap or video frame -> levels for the student, and the milliseconds that reading and resizing took. */
function prepare(source, width, height) {
  const start = performance.now();
  const levels = squareLevels(readPixels(source, width, height), student.settings.size);
  return { levels, ms: performance.now() - start };
}

/* For tests and measurements: a file's levels and embedding, a sentence's tokens and embedding, milliseconds of both. */
export async function examine(file, sentence) {
  await ready;
  const bitmap = await openPicture(file);
  const { levels } = prepare(bitmap, bitmap.width, bitmap.height);
  bitmap.close();
  const [image, text] = [await embedLevels(levels), await embedText(sentence)];
  return { levels, image: image.embedding, ids: text.ids, text: text.embedding, ms: [image.ms, text.ms] };
}

/* ---- the self-check ---- */

/* Computes the golden examples; gives the sentence that says what came out, and whether all agree. */
async function selfCheck() {
  const { golden, settings, form, tokenize } = student;
  const least = form === "int8" ? 0.9 : student.webgpu ? 0.999 : 0.9999; // WebGPU rounds otherwise
  let [off, cosine] = [0, 1];
  const wrong = [];
  for (const { name, file, levels, embedding } of golden.pictures) {
    const bitmap = await openPicture(new Blob([fromBase64(file)], { type: "image/png" }), name);
    const exported = fromBase64(levels);
    const own = squareLevels(readPixels(bitmap, bitmap.width, bitmap.height), settings.size);
    bitmap.close();
    const most = own.reduce((worst, level, i) => Math.max(worst, Math.abs(level - exported[i])), 0);
    const near = dot((await embedLevels(exported)).embedding, embedding);
    if (most > LEVELS) wrong.push(`the picture ${name} is read with pixels off by up to ${most} of 255 levels`);
    if (!(near >= least)) wrong.push(`the embedding of ${name} has cosine ${near.toFixed(4)} with the exported one`);
    [off, cosine] = [Math.max(off, most), Math.min(cosine, near)];
  }
  for (const { text, tokens, embedding } of golden.texts) {
    const ids = tokenize(text);
    const padded = ids.concat(Array(Math.max(0, tokens.length - ids.length)).fill(0));
    const near = dot((await embedText(text)).embedding, embedding);
    if (`${padded}` !== `${tokens}`) wrong.push(`the sentence “${text.slice(0, 40)}” has other tokens`);
    if (!(near >= least)) wrong.push(`the sentence “${text.slice(0, 40)}” has cosine ${near.toFixed(4)}`);
    cosine = Math.min(cosine, near);
  }
  if (wrong.length) return { agrees: false, text: `This device disagrees, do not trust its answers: ${wrong[0]}.` };
  const counts = `${golden.pictures.length} pictures and ${golden.texts.length} sentences`;
  const found = `pixels within ${off} of 255 levels, cosine at least ${cosine.toFixed(4)}`;
  return { agrees: true, text: `Self-check: ${counts} give the exported answers on this device (${found}).` };
}

/* ---- mode "ask" ---- */

let levels = null; // of the picture that is asked about
let readMs = 0;

const sentencesNow = () => [...new Set($("sentences").value.split("\n").map((line) => line.trim()).filter(Boolean))];

/* The bars: the softmax over the sentences, sharpened by the temperature that the student learnt. */
function showBars(sentences, cosines) {
  const scale = student.manifest.logit_scale;
  const top = Math.max(...cosines);
  const powers = cosines.map((cosine) => Math.exp(scale * (cosine - top)));
  const sum = powers.reduce((a, b) => a + b, 0);
  const rows = $("bars").children;
  if (rows.length !== sentences.length || sentences.some((sentence, i) => rows[i].dataset.sentence !== sentence)) {
    $("bars").replaceChildren(
      ...sentences.map((sentence) => {
        const row = document.createElement("li");
        row.dataset.sentence = sentence;
        row.append(Object.assign(document.createElement("span"), { textContent: sentence }));
        row.append(document.createElement("output"));
        return row;
      }),
    );
  }
  powers.forEach((power, i) => {
    const share = (100 * power) / sum;
    rows[i].classList.toggle("best", cosines[i] === top);
    rows[i].style.setProperty("--share", `${share.toFixed(1)}%`);
    rows[i].lastChild.textContent = `${share.toFixed(0)} % (${cosines[i].toFixed(3)})`;
  });
}

function showSpeed(imageMs, framesPerSecond) {
  const times = [...student.sentences.values()].map((sentence) => sentence.ms).sort((a, b) => a - b);
  const parts = [`image half ${imageMs.toFixed(1)} ms`, `reading and resizing ${readMs.toFixed(1)} ms`];
  if (times.length) parts.push(`text half ${times[times.length >> 1].toFixed(1)} ms a sentence, once`);
  if (framesPerSecond) parts.push(`${framesPerSecond.toFixed(1)} frames per second`);
  $("speed").textContent = parts.join(" · ");
}

/* Answer for the picture that is there; from the camera many times a second. */
async function answer(framesPerSecond = 0) {
  const sentences = sentencesNow();
  if (!levels) return;
  if (!sentences.length) {
    $("bars").replaceChildren();
    $("speed").textContent = "Write a sentence, or choose a ready-made set.";
    return;
  }
  const image = await embedLevels(levels);
  const texts = await embedSentences(sentences);
  showBars(sentences, texts.map((text) => dot(image.embedding, text)));
  showSpeed(image.ms, framesPerSecond);
}

/* Show a file and answer. It may come while the model still loads. */
async function askAbout(blob) {
  stopCamera();
  const bitmap = await openPicture(blob, blob.name || "What you gave");
  const shrink = Math.min(1, 800 / Math.max(bitmap.width, bitmap.height));
  const canvas = $("picture");
  canvas.width = Math.max(1, bitmap.width * shrink);
  canvas.height = Math.max(1, bitmap.height * shrink);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  [canvas.hidden, $("hint").hidden] = [false, true];
  await ready;
  ({ levels, ms: readMs } = prepare(bitmap, bitmap.width, bitmap.height));
  bitmap.close();
  await answer();
}

function imageIn(transfer) {
  const files = [...(transfer?.files ?? [])];
  const file = files.find((each) => each.type.startsWith("image/")) ?? files[0];
  if (!file) throw new Problem("There is no picture in what you gave; copy or drag the picture itself.");
  return file;
}

async function pasteFromButton() {
  if (!navigator.clipboard?.read) {
    throw new Problem("This browser lets a page read the clipboard only by the keys: press Ctrl-V, or Cmd-V.");
  }
  let items;
  try {
    items = await navigator.clipboard.read();
  } catch {
    throw new Problem("The clipboard could not be read: allow it, or press Ctrl-V, or Cmd-V.");
  }
  for (const item of items) {
    const kind = item.types.find((type) => type.startsWith("image/"));
    if (kind) return askAbout(await item.getType(kind));
  }
  throw new Problem("There is no picture in the clipboard; copy one first.");
}

/* ---- the camera ---- */

let stream = null;
let facing = "environment"; // the camera on the back of a phone; "user" is the one beside its screen
let starts = 0; // a start that is still under way when the camera is stopped or started again is given up

const endTracks = (own) => own?.getTracks().forEach((track) => track.stop());

function stopCamera() {
  starts++;
  endTracks(stream);
  stream = null;
  $("video").hidden = $("switch").hidden = true;
  $("camera").textContent = "Start the camera";
  $("camera").setAttribute("aria-pressed", "false");
  $("hint").hidden = !$("picture").hidden;
}

/* Start the camera of the wanted side. A device with one camera, such as a laptop, gives that one for both. */
async function startCamera() {
  if (!navigator.mediaDevices?.getUserMedia) {
    const remedy = "“Choose a picture” opens the camera app of a phone.";
    const plain = "Over plain http a browser gives no page the camera";
    throw new Problem(`${isSecureContext ? "This browser gives no page the camera" : plain}. ${remedy}`);
  }
  const own = ++starts;
  let started;
  try {
    started = await navigator.mediaDevices.getUserMedia({ video: { facingMode: facing } });
  } catch (error) {
    if (own !== starts) return;
    const reasons = {
      NotAllowedError: "The camera was not allowed. Allow it in the browser's settings of this page",
      NotFoundError: "This device has no camera",
      NotReadableError: "Another program holds the camera",
    };
    throw new Problem(`${reasons[error.name] ?? `The camera did not start (${error.message})`}; or choose a picture.`);
  }
  if (own !== starts) return endTracks(started);
  endTracks(stream);
  stream = started;
  const video = $("video");
  video.srcObject = stream;
  await video.play().catch((error) => {
    if (own === starts) throw error;
  });
  if (own !== starts) return;
  [video.hidden, $("picture").hidden, $("hint").hidden] = [false, true, true];
  $("camera").textContent = "Stop the camera";
  $("camera").setAttribute("aria-pressed", "true");
  $("switch").textContent = `Use the ${facing === "user" ? "back" : "front"} camera`;
  $("switch").hidden = false;
  await ready;
  await watch(started, video);
}

/* Go on with the other side. Many phones open one camera at a time, so the first one is stopped before. */
async function switchCamera() {
  const before = facing;
  facing = facing === "user" ? "environment" : "user";
  endTracks(stream);
  try {
    await startCamera();
  } catch (error) {
    if (error instanceof Problem) facing = before;
    stopCamera();
    throw error;
  }
}

/* Answer for frame after frame, until this camera is stopped. */
async function watch(own, video) {
  const ends = []; // of the last frames, in milliseconds
  while (stream === own) {
    await new Promise(requestAnimationFrame);
    if (stream !== own || video.readyState < 2) continue;
    ({ levels, ms: readMs } = prepare(video, video.videoWidth, video.videoHeight));
    ends.push(performance.now());
    if (ends.length > 20) ends.shift();
    const seconds = (ends.at(-1) - ends[0]) / 1000;
    await answer(ends.length > 1 ? (ends.length - 1) / seconds : 0);
  }
}

/* ---- mode "search" ---- */

let album = []; // rows {key, student, name, small, embedding} of the student that is loaded
let stopped = false;

function request(action) {
  return new Promise((resolve, reject) => {
    action.onsuccess = () => resolve(action.result);
    action.onerror = () => reject(action.error);
  });
}

/* The browser's own storage; null where it gives none, and photographs are then kept until the page is closed. */
const storage = (async () => {
  try {
    const opening = indexedDB.open("mclip", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("photographs", { keyPath: "key" });
    return await request(opening);
  } catch {
    return null;
  }
})();

async function store(mode = "readonly") {
  return (await storage)?.transaction("photographs", mode).objectStore("photographs");
}

/* Keep a row in the storage; gives "", or why it could not be kept. A full storage only says so at the very end. */
async function keep(row) {
  try {
    const kept = await store("readwrite");
    if (!kept) return "this browser gives the page no storage";
    kept.put(row);
    await new Promise((resolve, reject) => {
      kept.transaction.oncomplete = resolve;
      kept.transaction.onabort = () => reject(kept.transaction.error);
    });
    return "";
  } catch (error) {
    const full = error?.name === "QuotaExceededError";
    return full ? "the browser's storage is full" : `the browser's storage failed (${error?.message})`;
  }
}

async function loadAlbum() {
  const kept = await store();
  const rows = kept ? await request(kept.getAll()) : [];
  album = rows.filter((row) => row.student === student.name);
  showAlbum();
  await search();
}

function showAlbum(more = "") {
  const unkept = album.filter((row) => row.unkept);
  let where = album.length ? `${album.length} photographs are kept in this browser.` : "No photographs yet.";
  if (unkept.length) {
    where = `${album.length} photographs can be searched, ${unkept.length} of them only until the page is closed: `;
    where += `${unkept.at(-1).unkept}.`;
  }
  $("album").textContent = `${where} ${more}`.trim();
  $("forget").hidden = album.length === 0;
}

function smallCopy(bitmap) {
  const shrink = Math.min(1, 240 / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, bitmap.width * shrink);
  canvas.height = Math.max(1, bitmap.height * shrink);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.8));
}

async function addPhotograph(file, name, key) {
  const bitmap = await openPicture(file, name);
  const { levels: own } = prepare(bitmap, bitmap.width, bitmap.height);
  const { embedding } = await embedLevels(own);
  const row = { key, student: student.name, name, small: await smallCopy(bitmap), embedding };
  bitmap.close();
  row.unkept = await keep(row);
  album.push(row);
}

/* Embed the pictures among files; those that are kept already are not computed again. */
async function addPhotographs(chosen) {
  const files = [...chosen].filter((file) => /\.(jpe?g|png|webp|gif|bmp|avif|heic)$/i.test(file.name));
  if (!files.length) throw new Problem(`There is no picture among the ${chosen.length} files that you chose.`);
  await ready;
  const known = new Set(album.map((row) => row.key));
  const unreadable = [];
  [stopped, $("stop").hidden, $("progress").hidden, $("settings").disabled] = [false, false, false, true];
  $("progress").max = files.length;
  const start = performance.now();
  let done = 0;
  try {
    for (const file of files) {
      if (stopped) break;
      const name = file.webkitRelativePath || file.name;
      const key = [student.name, name, file.size, file.lastModified].join("|");
      try {
        if (!known.has(key)) await addPhotograph(file, name, key);
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        unreadable.push(name);
      }
      $("progress").value = ++done;
      showAlbum(`${done} of ${files.length} looked at.`);
      await new Promise((resume) => setTimeout(resume)); // let the page draw and hear the button
    }
  } finally {
    [$("stop").hidden, $("progress").hidden, $("settings").disabled] = [true, true, false];
  }
  const seconds = ((performance.now() - start) / 1000).toFixed(1);
  showAlbum(`${done} of ${files.length} looked at in ${seconds} s${stopped ? ", then stopped" : ""}.`);
  await search();
  if (unreadable.length) {
    throw new Problem(`${unreadable.length} files are no pictures that this browser can read: ${unreadable.join(", ")}.`);
  }
}

/* The photographs that fit the query best come first; without a query, nothing is shown. */
async function search() {
  const query = $("query").value.trim();
  if (!query || !album.length) return $("found").replaceChildren();
  const [wanted] = await embedSentences([query]);
  if ($("query").value.trim() !== query) return; // somebody types on
  const ranked = album.map((row) => [dot(row.embedding, wanted), row]).sort((a, b) => b[0] - a[0]);
  $("found").replaceChildren(
    ...ranked.slice(0, BEST).map(([cosine, row]) => {
      row.url ??= URL.createObjectURL(row.small);
      const [item, figure] = ["li", "figure"].map((tag) => document.createElement(tag));
      const text = `${row.name.split("/").at(-1)} (${cosine.toFixed(3)})`;
      figure.append(Object.assign(document.createElement("img"), { src: row.url, alt: "" }));
      figure.append(Object.assign(document.createElement("figcaption"), { textContent: text }));
      item.append(figure);
      return item;
    }),
  );
}

async function forget() {
  const kept = await store("readwrite");
  if (kept) await request(kept.clear());
  album.forEach((row) => row.url && URL.revokeObjectURL(row.url));
  album = [];
  showAlbum();
  await search();
}

/* ---- the page ---- */

/* Load the student that the switches say. Where that fails, the one before goes on working. */
async function load() {
  const [form, webgpu] = [$("float32").checked ? "float32" : "int8", $("float32").checked && $("webgpu").checked];
  $("webgpu-label").hidden = !$("float32").checked || !navigator.gpu;
  $("status").textContent = `Loading the ${form} student …`;
  $("settings").disabled = true;
  const before = student;
  try {
    student = await loadStudent(form, webgpu);
    const place = webgpu ? "WebGPU" : `WebAssembly, ${student.ort.env.wasm.numThreads} threads`.replace("1 threads", "1 thread");
    const megabytes = (student.bytes / 1e6).toFixed(1);
    $("status").textContent = `Ready: ${student.manifest.model.name}, ${form}, ${megabytes} MB of graphs and tokenizer, on ${place}.`;
    const check = await selfCheck();
    $("check").textContent = check.text;
    if (!check.agrees) report(new Problem(check.text));
    if (before) await inTurn(() => Promise.all([before.image.release(), before.text.release()]));
  } catch (error) {
    student = before;
    $("float32").checked = before?.form === "float32";
    $("webgpu").checked = before?.webgpu ?? false;
    $("status").textContent = before ? `The ${before.form} student is still there.` : "The student could not be loaded.";
    throw error;
  } finally {
    $("settings").disabled = false;
  }
  await loadAlbum();
}

/* What this page cannot do here, and why. */
function showNotes() {
  const notes = [];
  if (!isSecureContext) {
    notes.push(
      "This page came over plain http, so the browser gives no camera, keeps no copy for use without network, and " +
        "computes on one thread. “Choose a picture” opens the camera app of a phone; https gives the rest.",
    );
  } else if (!crossOriginIsolated) {
    notes.push("One thread only: the host did not send the headers that threads need; load the page once more.");
  }
  $("notes").textContent = notes.join(" ");
}

async function keepForOffline() {
  if (!isSecureContext || !navigator.serviceWorker) return;
  try {
    await navigator.serviceWorker.register("sw.js");
    await navigator.serviceWorker.ready;
    $("notes").textContent = `${$("notes").textContent} Kept on this device: the page opens without network.`.trim();
  } catch {
    $("notes").textContent = `${$("notes").textContent} The browser refused to keep a copy for use without network.`.trim();
  }
}

function choose(tab) {
  for (const each of document.querySelectorAll("[role=tab]")) {
    const on = each === tab;
    each.setAttribute("aria-selected", `${on}`);
    each.tabIndex = on ? 0 : -1;
    $(each.getAttribute("aria-controls")).hidden = !on;
  }
  tab.focus();
  if (tab.id !== "ask-tab") stopCamera();
}

function wireTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  tabs.forEach((tab, i) => {
    tab.onclick = () => choose(tab);
    tab.onkeydown = (event) => {
      if (event.key === "ArrowRight" || event.key === "ArrowLeft") choose(tabs[1 - i]);
    };
  });
}

async function wireSets() {
  const sets = JSON.parse(new TextDecoder().decode(await fetchBytes("sets.json")));
  $("set").replaceChildren(...Object.keys(sets).map((name) => new Option(name)));
  const fill = () => ($("sentences").value = sets[$("set").value].join("\n"));
  $("set").onchange = telling(async () => {
    fill();
    await ready;
    await answer();
  });
  fill();
}

/* The file that an input holds; the input forgets it, so that the same file can be chosen again. */
function take(event) {
  const files = [...event.target.files];
  event.target.value = "";
  return files;
}

function wireControls() {
  const stage = $("stage");
  const settle = (action, wait) => {
    let timer;
    return () => {
      clearTimeout(timer);
      timer = setTimeout(telling(action), wait);
    };
  };
  $("file").onchange = telling(async (event) => {
    const [file] = take(event);
    if (file) await askAbout(file);
  });
  $("paste").onclick = telling(pasteFromButton);
  document.onpaste = telling(async (event) => {
    const typing = event.target.matches?.("textarea, input");
    if (typing && !event.clipboardData.files.length) return; // text for a box
    await askAbout(imageIn(event.clipboardData));
  });
  document.ondragover = (event) => {
    event.preventDefault();
    stage.classList.add("over");
  };
  document.ondragleave = () => stage.classList.remove("over");
  document.ondrop = telling(async (event) => {
    event.preventDefault();
    stage.classList.remove("over");
    await askAbout(imageIn(event.dataTransfer));
  });
  $("camera").onclick = telling(async () => (stream ? stopCamera() : await startCamera()));
  $("switch").onclick = telling(switchCamera);
  $("sentences").oninput = settle(async () => {
    await ready;
    if (!stream) await answer();
  }, 250);
  for (const id of ["folder", "files"]) $(id).onchange = telling(async (event) => addPhotographs(take(event)));
  $("stop").onclick = () => (stopped = true);
  $("forget").onclick = telling(forget);
  $("query").oninput = settle(async () => {
    await ready;
    await search();
  }, 150);
  for (const id of ["float32", "webgpu"]) {
    $(id).onchange = telling(async () => {
      const before = ready;
      ready = load();
      await ready.catch((error) => {
        ready = before; // the student before goes on working
        throw error;
      });
      if (!stream) await answer();
    });
  }
}

wireTabs();
wireControls();
showNotes();
let ready = load();
telling(async () => {
  await wireSets();
  await ready;
  await keepForOffline();
})();
