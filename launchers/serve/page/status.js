// What is said of a session and its server: a word for the badge, and a sentence over the video.

const ENDS = {
  stopped: "Stopped.",
  finished: "Finished.",
  idle: "Ended, because nobody was here.",
  limit: "Ended at the longest time that this server allows.",
  failed: "Ended by a fault of the server.",
  server: "Ended, because the server stops.",
};

/**
 * @param {object | null} server what GET /v1/server says, `null` before it has answered
 * @param {Session | null} session
 */
export function badge(server, session) {
  if (!session) return { ready: "Ready", loading: "Loading", draining: "Restarting" }[server?.state] ?? "Connecting";
  if (session.isLost) return "Reconnecting";
  if (session.state === "running") {
    if (!session.isController) return "Watching";
    return session.newest < 0 ? "Starting" : "Live";
  }
  const words = { connecting: "Connecting", queued: "Waiting", paused: "Paused", done: "Ended" };
  return words[session.state] ?? session.state;
}

/** One sentence on what is happening, or nothing where the picture says it. It ends in … where one has to wait. */
export function status(server, session, video) {
  if (!session) {
    if (!server) return "The server does not answer yet…";
    return server.state === "ready" ? "" : `${sentence(server.status || "loading weights")}…`;
  }
  const { newest, queue, why } = session;
  if (session.isLost && newest < 0) return "The server does not answer. Trying again…";
  if (session.isLost) return "Connection lost. What is here plays on, and it comes back by itself…";
  if (session.doing && !session.hasEnded) return `${sentence(session.doing)}…`;
  switch (session.state) {
    case "connecting":
      return "Connecting…";
    case "queued":
      return queue ? `Number ${queue.position} of ${queue.length} in the queue…` : "In the queue…";
    case "running":
      if (newest < 0) return "Making the first chunk…";
      return video.readyState <= HTMLMediaElement.HAVE_CURRENT_DATA ? `Making chunk ${newest + 1}…` : "";
    case "paused":
      return newest < 0 ? "Paused." : `Paused after chunk ${newest}.`;
    case "done":
      return ENDS[why] ?? `Ended: ${why.replace(/\.$/, "")}.`;
  }
  return "";
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1).replace(/[.…]+$/, "");
