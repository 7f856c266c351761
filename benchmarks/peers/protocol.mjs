// A peer takes one JSON argument, {url, verb, queue, concurrency, batch, count, seconds, warmup_seconds, …}, does its
// verb for that long, and answers with one JSON line on standard output: at least {jobs, seconds, cpu_seconds}.
export const wanted = JSON.parse(process.argv[2]);
export const payload = { to: "a@example.com", n: 1 };

/** What is done between the end of the warm-up, which begins with the first job, and the end of the time. */
class Window {
  jobs = 0;
  total = 0;

  add(count) {
    const now = performance.now();
    this.from ??= now + wanted.warmup_seconds * 1000;
    this.total += count;
    if (now < this.from || now > this.from + wanted.seconds * 1000) return;
    this.cpu ??= process.cpuUsage();
    this.jobs += count;
    this.last = now;
  }

  get over() {
    return this.total >= wanted.count || performance.now() > this.from + wanted.seconds * 1000;
  }

  result() {
    const { user, system } = process.cpuUsage(this.cpu);
    return { jobs: this.jobs, seconds: (this.last - this.from) / 1000, cpu_seconds: (user + system) / 1e6 };
  }
}

/** Call `step`, which says how many jobs it did, over and over, `concurrency` times at once. */
export async function repeat(step) {
  const window = new Window();
  let dry = false;
  const loop = async () => {
    while (!dry && !window.over) {
      const done = await step();
      if (done === 0) dry = true;
      else window.add(done);
    }
  };
  await Promise.all(Array.from({ length: wanted.concurrency }, loop));
  return window.result();
}

/** Give `work` a function to call at each job done, and wait until there was time enough, or all is done. */
export async function watch(work) {
  const window = new Window();
  await work(() => window.add(1));
  while (!window.over) await sleep(2);
  return window.result();
}

/** Do `life`, which gives the milliseconds of its lease, `rate` times a second; give p50 and p99 of each slice. */
export async function paced(life) {
  const began = performance.now();
  const slices = Array.from({ length: wanted.slices }, () => []);
  const sliceMs = (wanted.seconds * 1000) / wanted.slices;
  const pauseMs = (1000 * wanted.concurrency) / wanted.rate;
  const loop = async (_, number) => {
    let due = began + (pauseMs * number) / wanted.concurrency;
    for (;;) {
      await sleep(due - performance.now());
      const slice = slices[Math.floor((performance.now() - began) / sliceMs)];
      if (slice === undefined) return;
      slice.push(await life());
      due = Math.max(due + pauseMs, performance.now());
    }
  };
  await Promise.all(Array.from({ length: wanted.concurrency }, loop));
  const jobs = slices.reduce((sum, slice) => sum + slice.length, 0);
  return { jobs, seconds: wanted.seconds, slices: slices.map((slice) => [at(slice, 0.5), at(slice, 0.99)]) };
}

function at(values, share) {
  if (values.length === 0) return null;
  values.sort((a, b) => a - b);
  return values[Math.min(values.length - 1, Math.floor(values.length * share))];
}

export function sleep(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, Math.max(0, milliseconds)));
}

/** Run the verb that is wanted, say what came of it, and leave, whatever still runs. */
export async function answer(verbs) {
  setTimeout(() => process.exit(3), wanted.limit_seconds * 1000);
  const result = await verbs[wanted.verb]();
  process.stdout.write(`${JSON.stringify(result)}\n`, () => process.exit(0));
}
