// What is shown of the rollouts, chosen by phase, step, outcome, words, question and sibling; the address keeps it.
"use strict";

const OUTCOMES = ["all", "mixed", "right", "wrong"];
const LISTED = 300; // more entries help nobody; the step chooses
const DASH = "–";

const state = {run: 0, phase: "", step: "", outcome: "all", words: "", group: null, place: 0, measure: "", chosen: null};
const host = document.getElementById("explorer");
const parts = {};

const unique = (values) => [...new Set(values)];
const inPhase = (group) => group.run === state.run && group.phase === state.phase;
const steps = () => unique(DATA.groups.filter(inPhase).map((group) => group.step));

function inStep(group) {
  const words = state.words.toLowerCase();
  return inPhase(group) && (state.step === "" || String(group.step) === state.step)
    && (!words || [group.question, ...group.gold].some((text) => text.toLowerCase().includes(words)));
}

const listed = () => DATA.groups.filter((group) => inStep(group) && (state.outcome === "all" || group.outcome === state.outcome));

// Where a page opens: at a group of the chosen run, or of the first one that has some.
function opening() {
  const groups = DATA.groups.filter((group) => group.run === state.run);
  return groups[DATA.openings[state.run]] ?? DATA.groups[0];
}

const addressOf = (group) => ["rollouts", group.run, group.phase, group.step, group.instance.join(".")].join("/");

function fromAddress() {
  const [, address, place] = location.hash.match(/^#(.+)\/(\d+)$/) ?? [];
  const found = address && DATA.groups.find((group) => encodeURI(addressOf(group)) === address);
  return found ? [found, Math.min(found.rollouts.length - 1, Number(place))] : null;
}

function toAddress() {
  try { history.replaceState(null, "", `#${encodeURI(addressOf(state.group))}/${state.place}`); } catch { /* a page in a frame */ }
}

function open(group, place = 0) {
  Object.assign(state, {run: group.run, phase: group.phase, step: String(group.step), outcome: "all", words: ""});
  choose(group, place);
}

function choose(group, place = 0, query = null) {
  Object.assign(state, {group, place, chosen: null});
  if (group) {
    const found = measuresOf(group);
    if (!found.includes(state.measure)) state.measure = found[0] ?? "";
    state.chosen = query === null ? null : telling(group.rollouts[place], query);
  }
  draw();
}

// The token of a query that says most.
function telling(rollout, number) {
  const query = queriesOf(rollout)[number]?.query;
  if (!query?.tokens) return null;
  const sizes = query.tokens.map((_, i) => (query.unreliable?.includes(i) || !isNumber(query.teacher[i]) ? 0 : Math.abs(query.teacher[i] - query.student[i])));
  return {query: number, token: sizes.indexOf(Math.max(...sizes))};
}

function refilter() {
  const found = listed();
  choose(found.includes(state.group) ? state.group : found[0] ?? null, found.includes(state.group) ? state.place : 0);
}

function select(label, options, value, onchange) {
  const made = el("select", {onchange: () => onchange(made.value)}, ...options.map(([name, text]) => el("option", {value: name, selected: String(name) === String(value)}, text)));
  return el("label", {}, label, made);
}

function drawFilters() {
  const every = DATA.groups.filter(inStep);
  const phases = unique(DATA.groups.filter((group) => group.run === state.run).map((group) => group.phase));
  const known = steps();
  const move = (by) => {
    const index = known.map(String).indexOf(state.step);
    state.step = String(known[Math.min(known.length - 1, Math.max(0, (index < 0 ? (by > 0 ? -1 : known.length) : index) + by))]);
    refilter();
  };
  const controls = [
    DATA.runs.length > 1 ? select("run", DATA.runs.map((name, index) => [index, name]), state.run, (value) => { state.run = Number(value); open(opening()); }) : null,
    phases.length > 1 ? select("phase", phases.map((name) => [name, DATA.phases[name] ?? name]), state.phase, (value) => { Object.assign(state, {phase: value, step: ""}); state.step = String(steps().at(-1)); refilter(); }) : null,
    el("div.stepper", {}, select("step", [["", "all steps"], ...known.map((step) => [step, step])], state.step, (value) => { state.step = value; refilter(); }),
      el("button", {type: "button", title: "step before", "aria-label": "step before", onclick: () => move(-1)}, "‹"),
      el("button", {type: "button", title: "next step", "aria-label": "next step", onclick: () => move(1)}, "›")),
    el("div.switch", {role: "group", "aria-label": "outcome of the group"}, ...OUTCOMES.map((name) => el("button", {type: "button", "aria-pressed": name === state.outcome, "data-outcome": name,
      onclick: () => { state.outcome = name; refilter(); }}, `${name} `, el("small", {}, `${name === "all" ? every.length : every.filter((group) => group.outcome === name).length}`)))),
  ];
  parts.filters.replaceChildren(...controls.filter(Boolean));
}

function drawList() {
  const found = listed();
  const entries = found.slice(0, LISTED).map((group) => {
    const dots = el("span.dots", {}, ...group.rollouts.map((rollout) => el(rollout.right ? "i.is-right" : "i.is-wrong")));
    return el("button.entry", {type: "button", "aria-pressed": group === state.group, onclick: () => choose(group)},
      el("span.head", {}, state.step === "" ? el("small", {}, `step ${group.step}`) : null, dots, el("small", {}, group.outcome)), el("span.text", {}, group.question));
  });
  if (found.length > LISTED) entries.push(el("p", {}, `${found.length - LISTED} more: choose a step.`));
  if (!found.length) entries.push(el("p", {}, "No group is like that. Choose another step or outcome."));
  parts.list.replaceChildren(...entries);
  // Only the list itself may scroll: scrollIntoView would move the page.
  const pressed = parts.list.querySelector("[aria-pressed=true]");
  if (pressed) parts.list.scrollTop = Math.max(0, pressed.offsetTop - parts.list.clientHeight / 3);
}

function drawGroup() {
  const group = state.group;
  if (!group) return parts.group.replaceChildren();
  const found = measuresOf(group);
  const rollout = group.rollouts[state.place];
  const measure = found.includes(state.measure) ? state.measure : null;
  const about = [`${DATA.phases[group.phase] ?? group.phase}, step ${group.step}`, `question ${group.instance.join(".")}`, group.source].filter(Boolean).join(", ");
  const block = group.block ?? rollout.block;
  const facts = [rollout.verdict, isNumber(rollout.reward) ? `reward ${fixed(rollout.reward)}` : null, isNumber(rollout.advantage) ? `advantage ${signed(rollout.advantage)}` : null];
  const [shift, isOpen] = [parts.group.querySelector(".scroll")?.scrollLeft, parts.group.querySelector("details")?.open];
  parts.group.replaceChildren(
    el("p.about", {}, about),
    el("p.asked", {}, group.question, el("small", {}, `gold: ${group.gold.join(" | ") || DASH}`)),
    measures(found, measure),
    creditMap(group, measure, state.place, (place, query) => { choose(group, place, query); focusToken(); }),
    block ? el("details", {}, el("summary", {}, `hindsight block${found.includes("verdict") ? ": what the teacher read" : ""}`), el("pre", {}, block)) : "",
    el("div.card", {},
      el("h3", {}, `sibling ${siblingName(rollout)}`, el(`span.${rollout.right ? "right" : "wrong"}`, {}, facts.filter(Boolean).join(", "))),
      transcript(rollout, measure, state.chosen, pick)),
    found.includes("verdict") ? el("p.keys", {}, "A word of a query: click it, or Tab to it and ← →. Next question: j, k. Sibling: 1 to 9. Esc closes.") : el("p.keys", {}, "Next question: j, k. Sibling: 1 to 9."));
  if (shift) parts.group.querySelector(".scroll").scrollLeft = shift;
  if (isOpen && block) parts.group.querySelector("details").open = true;
}

function measures(found, measure) {
  if (!found.length) return el("p.none", {}, state.group.phase === "train" ? "No query of this group has a verdict or a credit: no teacher was asked, as in a warm-up or where hindsight.groups leaves the group out." : "Teacher and credit belong to training groups; these are evaluated only.");
  return el("div.switch.measures", {role: "group", "aria-label": "number shown"}, ...found.map((name) => el("button", {type: "button", "aria-pressed": name === measure, "data-measure": name,
    onclick: () => { state.measure = name; drawGroup(); }}, MEASURES[name].label, " ", el("small", {}, MEASURES[name].unit))));
}

function pick(query, token) {
  if (state.chosen?.query === query && state.chosen.token === token) return;
  state.chosen = {query, token};
  drawGroup();
  focusToken();
}

function focusToken() {
  if (state.chosen) parts.group.querySelector(`[data-query="${state.chosen.query}"][data-token="${state.chosen.token}"]`)?.focus();
}

function draw() {
  drawFilters();
  drawList();
  drawGroup();
  if (state.group) toAddress();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  const found = listed();
  const at = found.indexOf(state.group);
  const {key} = event;
  if (key === "Escape" && state.chosen) { const {query, token} = state.chosen; state.chosen = null; drawGroup(); parts.group.querySelector(`[data-query="${query}"][data-token="${token}"]`)?.blur(); }
  else if (key === "j" && found[at + 1]) choose(found[at + 1]);
  else if (key === "k" && found[at - 1]) choose(found[at - 1]);
  else if (/^[1-9]$/.test(key) && state.group?.rollouts[key - 1]) choose(state.group, key - 1);
  else if ((key === "ArrowRight" || key === "ArrowLeft") && event.target.classList?.contains("token")) {
    const words = [...parts.group.querySelectorAll(".token")];
    words[words.indexOf(event.target) + (key === "ArrowRight" ? 1 : -1)]?.focus();
    event.preventDefault();
  }
}

if (host) {
  parts.filters = el("div.filters");
  parts.list = el("div.list", {role: "group", "aria-label": "questions"});
  parts.group = el("div.group");
  const words = el("input", {type: "search", placeholder: "words of the question", "aria-label": "words of the question", oninput: () => { state.words = words.value; refilter(); words.focus(); }});
  host.append(el("div.chooser", {}, parts.filters, words, parts.list), parts.group);
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => { const there = fromAddress(); if (there) open(...there); });
  open(...(fromAddress() ?? [opening(), 0]));
  if (state.measure === "verdict") { // show at once that a word tells more
    state.chosen = telling(state.group.rollouts[state.place], 0);
    drawGroup();
  }
}
