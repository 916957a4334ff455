/* Keeps the page on this device, and adds the headers that threads need where a host does not send them.

   The export writes FILES above this comment: {path: SHA-256} of every file of the page. When one changes, this file
   changes, and the browser installs it anew. */

const PLACE = `mclip ${self.registration.scope} `; // another page on this host keeps its own files
const CACHE = PLACE + Object.values(FILES).map((hash) => hash.slice(0, 8)).join("");
const LATER = /^(float32|vendor\/webgpu)\//; // large, and kept only once somebody has asked for them

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/* Isolation allows threads; it holds for files from the cache as for those from the network. */
function isolated(response) {
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(response.body, { status: response.status, headers });
}

/* Fetch a file, keep it if it is what was exported, and give it. */
async function fetchAndKeep(name) {
  const response = await fetch(name, { cache: "no-cache" });
  if (!response.ok) return response;
  const right = (await sha256(await response.clone().arrayBuffer())) === FILES[name];
  if (right) await (await caches.open(CACHE)).put(name, response.clone());
  return response;
}

async function install() {
  for (const name of Object.keys(FILES).filter((each) => !LATER.test(each))) {
    if (!(await fetchAndKeep(name)).ok) throw new Error(`${name} is missing`);
  }
  await self.skipWaiting();
}

async function activate() {
  const old = (await caches.keys()).filter((name) => name.startsWith(PLACE) && name !== CACHE);
  await Promise.all(old.map((name) => caches.delete(name)));
  await self.clients.claim();
}

async function answer(name) {
  const kept = await (await caches.open(CACHE)).match(name);
  return isolated(kept ?? (await fetchAndKeep(name)));
}

self.addEventListener("install", (event) => event.waitUntil(install()));
self.addEventListener("activate", (event) => event.waitUntil(activate()));
self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  const scope = self.registration.scope;
  if (event.request.method !== "GET" || !url.href.startsWith(scope)) return;
  const name = url.href.slice(scope.length).split(/[?#]/)[0] || "index.html";
  if (name in FILES) event.respondWith(answer(name));
});
