#!/usr/bin/env node
// A leaseq worker in Node 18 or newer, no packages. Its work: digest a file.
//
// Copy it and put your own work in the place of `digest`; the rest stays as it is.
// Environment: LEASEQ_URL, LEASEQ_QUEUE, LEASEQ_WORKER, LEASEQ_LEASE_SECONDS.

import { createHash } from "node:crypto";
import { createReadStream } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";

const url = (process.env.LEASEQ_URL ?? "http://127.0.0.1:8080").replace(/\/$/, "");
const queue = process.env.LEASEQ_QUEUE ?? "files";
const worker = process.env.LEASEQ_WORKER ?? `node-${process.pid}`;
const leaseSeconds = Number(process.env.LEASEQ_LEASE_SECONDS ?? 30);
const waitSeconds = 20;

// The same few lines in every language: a retry may land on a worker in another language, and must not differ.
const mediaTypes = {
  ".py": "text/x-python",
  ".txt": "text/plain",
  ".html": "text/html",
  ".xml": "application/xml",
  ".json": "application/json",
  ".c": "text/x-c",
  ".h": "text/x-c",
  ".so": "application/x-sharedlib",
  ".png": "image/png",
};

const log = (...words) => console.error(worker, ...words);

const mediaType = (path) =>
  Object.entries(mediaTypes).find(([end]) => path.endsWith(end))?.[1] ?? "application/octet-stream";

// The work: SHA-256, size in bytes, number of newlines and media type of a file, read as a stream.
async function digest(path, abandoned) {
  const sha256 = createHash("sha256");
  let size = 0;
  let lines = 0;
  for await (const chunk of createReadStream(path, { highWaterMark: 1 << 20, signal: abandoned })) {
    sha256.update(chunk);
    size += chunk.length;
    for (let at = chunk.indexOf(10); at >= 0; at = chunk.indexOf(10, at + 1)) lines += 1;
  }
  return { sha256: sha256.digest("hex"), size, lines, media_type: mediaType(path), language: "node" };
}

// The service understood and said no: the lease is lost (409), or the request is wrong.
class Refused extends Error {}

// POSTs and gives the answer; while the service is away, pauses and tries again.
// Safe for ack and fail: a repeat with the same lease changes nothing and gets the same answer.
// Throws Refused, or another Error when no try was answered.
async function post(path, body, tries = 20) {
  for (let attempt = 1; ; attempt += 1) {
    let pauseSeconds = Math.min(10, 0.25 * 2 ** attempt) * (0.5 + Math.random() / 2);
    let reason;
    try {
      const response = await fetch(url + path, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(body),
        signal: AbortSignal.timeout((waitSeconds + 10) * 1000),
      });
      if (response.status === 200) return await response.json();
      reason = `${response.status} ${await response.text()}`;
      if (response.status < 500 && response.status !== 429) throw new Refused(reason);
      pauseSeconds = Number(response.headers.get("Retry-After")) || pauseSeconds;
    } catch (error) {
      if (error instanceof Refused) throw error;
      reason = error.cause ?? error;
    }
    if (attempt >= tries) throw new Error(reason);
    log(`no answer (${reason}), trying again in ${pauseSeconds.toFixed(1)} s`);
    await sleep(pauseSeconds * 1000);
  }
}

// Extends the lease while `work` runs; aborts the work once it is in vain.
async function withHeartbeats(job, work) {
  const abandoned = new AbortController();
  const beat = async () => {
    try {
      const answer = await post(`/jobs/${job.id}/heartbeat`, { lease_id: job.lease_id }, 1);
      if (answer.cancel_requested) abandoned.abort();
    } catch (error) {
      if (error instanceof Refused) abandoned.abort();
      else log(`heartbeat: ${error.message}`);
    }
  };
  const timer = setInterval(beat, (leaseSeconds * 1000) / 3);
  try {
    return await work(abandoned.signal);
  } finally {
    clearInterval(timer);
  }
}

// Does one job and tells the service how it went.
async function handle(job) {
  let verb = "ack";
  let outcome;
  try {
    outcome = { result: await withHeartbeats(job, (abandoned) => digest(job.payload.path, abandoned)) };
  } catch (error) {
    verb = "fail";
    outcome = { error: { type: error.code ?? error.name, message: error.message, stack: error.stack } };
  }
  try {
    await post(`/jobs/${job.id}/${verb}`, { lease_id: job.lease_id, ...outcome });
    log(verb, job.id);
  } catch (error) {
    // 409 lease_lost: the job is another worker's by now, or nobody's; its result is not ours.
    log(`${verb} ${job.id} dropped: ${error.message}`);
  }
}

// SIGTERM and Ctrl-C: leave now if no job is in hand, else after it. A second signal ends the process at once.
let leaving = false;
let polling = true;
const leave = () => {
  leaving = true;
  if (polling) process.exit();
};
process.once("SIGTERM", leave);
process.once("SIGINT", leave);

const wish = { queues: [queue], types: ["file-digest"], worker, wait_seconds: waitSeconds, lease_seconds: leaseSeconds };
while (!leaving) {
  const { jobs } = await post("/lease", wish, Infinity);
  polling = false;
  for (const job of jobs) await handle(job);
  polling = true;
}
