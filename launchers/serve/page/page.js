// The page: what the user does goes to the session, what the session says is shown.

import { History } from "./history.js";
import { PlayedRate } from "./measures.js";
import { missing } from "./player.js";
import { Session, address } from "./session.js";
import { Settings, StartFile, showSamples, showTransitions } from "./settings.js";
import { badge, status } from "./status.js";
import { Strip } from "./strip.js";
import { fill, find } from "./words.js";

const REMEMBERED = "helios-session";
const LIKELY_MIME = 'video/mp4; codecs="avc1.42c01e"';
const FAR_BEHIND = 3; // Chunks after which a viewer is offered the newest picture.

const video = find("video");
const prompt = find("prompt");
const played = new PlayedRate(video);
const strip = new Strip(find("strip"));
const settings = new Settings(find("settings"));
const startFile = new StartFile(complain);
const history = new History(find("history"), find("change"), {
  reuse: pick,
  announce: (text) => fill(find("announced"), text),
});

let server = null; // What GET /v1/server says.
let session = null;

// What is shown

function show() {
  const state = session?.state ?? "idle";
  const isLost = Boolean(session?.isLost);
  const isViewer = session !== null && !session.isController;
  document.body.dataset.state = state;
  document.body.dataset.role = isViewer ? "viewer" : "controller";
  document.body.classList.toggle("has-picture", (session?.newest ?? -1) >= 0);
  document.body.classList.toggle("is-lost", isLost);
  document.body.classList.toggle("is-ready", server?.state === "ready");
  startFile.isOpen = session === null;

  const isActive = ["running", "paused"].includes(state) && !isLost;
  for (const button of document.querySelectorAll(".steers")) button.disabled = !isActive || isViewer;
  find("stop").disabled &&= state !== "queued" || isLost || isViewer;
  find("step").disabled ||= state !== "paused";
  fill(find("pause-text"), state === "paused" ? "Resume" : "Pause");
  find("pause-icon").setAttribute("href", state === "paused" ? "#i-play" : "#i-pause");
  for (const id of ["save-video", "save-schedule"]) find(id).disabled = !session || session.newest < 0;
  find("share").disabled = !session?.viewToken;
  find("send").disabled = session !== null && !isActive;
  fill(find("send"), session ? "Change" : "Start");
  fill(find("prompt-label"), session ? "What to show next" : "What to show");
  prompt.placeholder = session ? "What comes next?" : "a red fox running through fresh snow";
  find("retry").hidden = !isLost;

  const said = badge(server, session);
  fill(find("badge-text"), said);
  document.title = session ? `${said} · Helios live` : "Helios live";
  const text = status(server, session, video);
  fill(find("status"), text);
  find("status").classList.toggle("is-busy", text.endsWith("…"));
  if (session) {
    history.show(session);
    strip.show(session);
  }
}

function showFigures() {
  const rate = session && played.read();
  fill(find("made"), session?.made ? session.made.toFixed(1) : "–");
  fill(find("played"), rate == null || session.newest < 0 ? "–" : rate.toFixed(1));
  fill(find("lead"), session && session.newest >= 0 ? session.lead.toFixed(1) : "–");
  fill(find("lag"), session?.lag == null ? "–" : session.lag.toFixed(1));
  const isBehind = session?.seconds && session.lead > FAR_BEHIND * session.seconds;
  find("go-live").hidden = !isBehind || session.isController;
}

function complain(text, code) {
  fill(find("alert-text"), text);
  find("alert").hidden = false;
  if (code === "unauthorized") settings.askKey();
  if (session?.state === "connecting" && code) {
    prompt.value ||= session.changes[0]?.prompt ?? "";
    leave();
  }
}

function pick(text) {
  prompt.value = text;
  prompt.focus();
}

// Sessions

function begin() {
  history.clear();
  session = new Session(video, show, complain, (isBlocked) => (find("unblock").hidden = !isBlocked));
  find("alert").hidden = true;
  return session;
}

async function submit() {
  const text = prompt.value.trim();
  if (!text) return prompt.focus();
  if (session) {
    session.change(text, Number(find("transition").value));
    prompt.value = "";
    return;
  }
  if (!settings.isValid) return;
  const lack = missing(server?.mime ?? LIKELY_MIME);
  if (lack) return complain(lack);
  try {
    const request = { prompt: text, ...settings.read(), ...(await startFile.read()) };
    begin().start(request);
    prompt.value = "";
    show();
  } catch (error) {
    complain(error.message);
  }
}

/** Back to the form; the session itself goes on, or has ended. */
function leave() {
  session?.close();
  session = null;
  sessionStorage.removeItem(REMEMBERED);
  if (location.hash) window.history.replaceState(null, "", location.pathname);
  history.clear();
  show();
  prompt.focus();
}

/** A session of this tab or of a viewers' link. */
function comeBack() {
  const link = new URLSearchParams(location.hash.slice(1));
  const lack = missing(LIKELY_MIME);
  if (lack) return complain(lack);
  if (link.get("watch")) return begin().watch(link.get("watch"), link.get("token"));
  const remembered = JSON.parse(sessionStorage.getItem(REMEMBERED) ?? "null");
  if (remembered) begin().attach(remembered);
}

function remember() {
  const memory = session?.memory;
  if (memory && !session.hasEnded) sessionStorage.setItem(REMEMBERED, JSON.stringify(memory));
  else if (session?.hasEnded) sessionStorage.removeItem(REMEMBERED);
}

/** Saves a file of the session. The token travels in a header, so that no address holds it. */
async function save(name) {
  const headers = { authorization: `Bearer ${session.viewToken}` };
  const { id } = session;
  try {
    const answer = await fetch(address(`v1/sessions/${encodeURIComponent(id)}/${name}`), { headers });
    if (!answer.ok) throw new Error(`the server answers ${answer.status}`);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = `helios-${id}-${name}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  } catch (error) {
    complain(`${name} cannot be saved: ${error.message}.`);
  }
}

// The server, asked until its weights are loaded

async function askServer() {
  try {
    const answer = await fetch(address("v1/server"));
    if (!answer.ok) throw new Error(answer.status);
    server = await answer.json();
    settings.show(server);
    startFile.most = server.limits?.upload_bytes;
    if (server.limits?.prompt_characters) prompt.maxLength = server.limits.prompt_characters;
    fill(find("model"), server.model ?? "");
    showSamples(server.prompts ?? [], pick);
    showTransitions(server);
  } catch {
    server = null;
  }
  show();
  if (server?.state !== "ready") setTimeout(askServer, 2000);
}

// What the user does

const actions = {
  pause: () => (session.state === "paused" ? session.resume() : session.pause()),
  step: () => session.step(),
  stop: () => session.stop(),
  new: leave,
  retry: () => session.retryNow(),
  unblock: () => session.play(),
  "go-live": () => session.goLive(),
  "save-video": () => save("video.mp4"),
  "save-schedule": () => save("schedule.json"),
  full: () => {
    if (document.fullscreenElement) document.exitFullscreen();
    else if (document.fullscreenEnabled) find("stage").requestFullscreen();
    else video.webkitEnterFullscreen?.(); // An iPhone gives the whole screen to a video alone.
  },
  "alert-close": () => (find("alert").hidden = true),
  "reset-cancel": () => find("reset-dialog").close(),
  "keys-open": () => find("keys-dialog").showModal(),
  share: () => {
    find("share-link").value = session.viewersLink;
    fill(find("share-said"), "");
    find("share-dialog").showModal();
    find("share-link").select();
  },
  "share-copy": async () => {
    find("share-link").select();
    // The clipboard is closed to pages that came by plain http from another machine.
    const copying = navigator.clipboard?.writeText(find("share-link").value);
    const isCopied = await copying?.then(
      () => true,
      () => false,
    );
    fill(find("share-said"), isCopied ? "Copied." : "Selected: press Ctrl C.");
  },
  reset: () => {
    const latest = session.changes.findLast(({ state }) => state === "shown" || state === "coming");
    find("reset-prompt").value = latest?.prompt ?? "";
    find("reset-seed").value = session.configuration.seed ?? 42;
    find("reset-dialog").showModal();
  },
};
for (const [id, act] of Object.entries(actions)) find(id).addEventListener("click", act);

find("reset-dialog").addEventListener("close", ({ target }) => {
  const [seed, text] = [find("reset-seed").valueAsNumber, find("reset-prompt").value.trim()];
  if (target.returnValue === "reset") session.reset(seed, text);
  target.returnValue = "";
});
for (const id of ["composer", "settings"]) {
  find(id).addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
}
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Escape") prompt.blur();
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  find("composer").requestSubmit(find("send"));
});

const shortcuts = { p: "pause", ".": "step", r: "reset", f: "full", "?": "keys-open" };
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, textarea, select, dialog");
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") {
    event.preventDefault();
    prompt.focus();
  }
  const button = shortcuts[event.key] && find(shortcuts[event.key]);
  if (button && !button.disabled) button.click();
});

// The clock of the page: pictures while it is seen, the video's own `timeupdate` also while it is hidden

function look() {
  if (!session || video.seeking || video.readyState < HTMLMediaElement.HAVE_CURRENT_DATA) return;
  for (const change of session.look()) history.picture(change, video);
}

function eachPicture() {
  look();
  video.requestVideoFrameCallback(eachPicture);
}

if (video.requestVideoFrameCallback) video.requestVideoFrameCallback(eachPicture);
video.addEventListener("resize", () => {
  document.body.style.setProperty("--shape", video.videoWidth / video.videoHeight);
});
video.addEventListener("timeupdate", () => {
  look();
  session?.reportPosition();
});
setInterval(() => {
  session?.reportPosition();
  showFigures();
  if (session) show();
}, 250);
addEventListener("pagehide", remember);
addEventListener("hashchange", () => {
  if (!location.hash) return;
  session?.close();
  session = null;
  comeBack();
});

comeBack();
askServer();
