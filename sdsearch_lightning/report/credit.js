// The credit map of a group, the chosen sibling, and the chosen token of one of its queries.
"use strict";

const MEASURES = {
  verdict: {
    label: "teacher − student", unit: "nats per token", show: signed, reach: 1,
    query: (query) => query.verdict, doubtful: (query) => query.doubtful,
    token: (query, i) => (isNumber(query.teacher[i]) && isNumber(query.student[i]) ? query.teacher[i] - query.student[i] : -Infinity),
  },
  jsd: {
    label: "JSD", unit: "nats per token", show: (value) => fixed(value, 3), reach: Math.LN2 / 2, hues: ["jsd", "jsd"],
    query: (query) => query.mean_jsd, token: (query, i) => query.jsd[i],
  },
  credit: {
    label: "own credit", unit: "standard deviations", show: signed, reach: 2,
    query: (query) => query.credit,
  },
};

const LONG = 400; // characters, about four lines
const queriesOf = (rollout) => rollout.rows.filter((row) => row.query);
const answerOf = (rollout) => rollout.rows.findLast((row) => row.kind === "ANSWER");

function measuresOf(group) {
  const queries = group.rollouts.flatMap(queriesOf).map((row) => row.query);
  return Object.keys(MEASURES).filter((name) => queries.some((query) => isNumber(MEASURES[name].query(query))));
}

function mark(right) {
  return el(`span.${right ? "right" : "wrong"}`, {"aria-label": right ? "right" : "wrong"}, right ? "✓" : "✗");
}

function siblingName(rollout) {
  return rollout.decoding === "greedy" ? "greedy" : `${rollout.decoding ?? ""} ${rollout.index + 1}`.trim();
}

// A row per sibling, a column per search; choose(place, query) is called with the row and the search (or none).
function creditMap(group, measure, place, choose) {
  const most = Math.max(0, ...group.rollouts.map((rollout) => queriesOf(rollout).length));
  const heads = Array.from({length: most}, (_, index) => el("th", {scope: "col"}, `search ${index + 1}`));
  const rows = group.rollouts.map((rollout, index) => {
    const queries = queriesOf(rollout);
    const cells = Array.from({length: most}, (_, column) => el("td", {}, queries[column] ? cell(queries[column], measure, () => choose(index, column)) : null));
    const answer = answerOf(rollout);
    const name = el("button.sibling", {type: "button", onclick: () => choose(index, null), "aria-pressed": index === place, title: rollout.verdict},
      mark(rollout.right), ` ${siblingName(rollout)} `, isNumber(rollout.advantage) ? el("small", {}, el("span.wide", {}, "advantage "), signed(rollout.advantage)) : null);
    return el(index === place ? "tr.chosen" : "tr", {}, el("th", {scope: "row"}, name), ...cells,
      el("td.answer", {title: answer?.text ?? ""}, answer ? answer.text : el("small", {}, rollout.verdict)));
  });
  return el("div.scroll", {tabIndex: -1}, el("table.map", {},
    el("thead", {}, el("tr", {}, el("th", {scope: "col"}, "sibling"), ...heads, el("th", {scope: "col"}, "answer"))), el("tbody", {}, ...rows)));
}

function cell(row, measure, onclick) {
  const value = measure ? MEASURES[measure].query(row.query) : null;
  const made = el("button.cell", {type: "button", onclick, title: row.text}, el("span", {}, row.text));
  if (measure) made.append(el("b", {}, MEASURES[measure].show(value)));
  if (measure && MEASURES[measure].doubtful?.(row.query)) made.classList.add("doubtful");
  else if (measure) tint(made, value, MEASURES[measure].reach, MEASURES[measure].hues);
  return made;
}

// The rows of a rollout; `chosen` is {query, token} or null, and pick(query, token) is called with a new one.
function transcript(rollout, measure, chosen, pick) {
  const list = el("dl.rows");
  let number = 0;
  for (const row of rollout.rows) {
    const kind = row.kind === "ANSWER" ? `dd.ANSWER.${rollout.right ? "right" : "wrong"}` : `dd.${/^[A-Z]+$/.test(row.kind) ? row.kind : "OTHER"}`;
    const shown = row.query ? queryRow(row, number, measure, chosen, pick) : passage(row.text);
    if (row.query) number += 1;
    if (row.cut) shown.push(el("small", {}, ` … ${row.cut.toLocaleString("en")} more characters`));
    list.append(el("dt", {}, DATA.labels[row.kind] ?? ""), el(kind, {}, ...shown));
  }
  return list;
}

// A long text shows its beginning; a button shows the rest.
function passage(text) {
  if (text.length <= LONG) return [text];
  const shown = el("div.beginning", {}, text);
  const more = el("button.more", {type: "button", onclick: () => { more.textContent = shown.classList.toggle("beginning") ? "show all" : "show less"; }}, "show all");
  return [shown, more];
}

function queryRow(row, number, measure, chosen, pick) {
  const query = row.query;
  const isHere = chosen !== null && chosen.query === number;
  const words = query.tokens ? tokens(query, number, measure, isHere ? chosen.token : null, pick) : el("span.words", {}, row.text);
  return [words, numbers(query), isHere && query.tokens ? detail(query, chosen.token) : null].filter(Boolean);
}

function tokens(query, number, measure, chosen, pick) {
  const by = MEASURES[measure]?.token ? measure : "verdict";
  const words = el("span.words", {role: "group", "aria-label": `tokens of search ${number + 1}`});
  query.tokens.forEach((text, i) => {
    const value = MEASURES[by].token(query, i);
    const word = el("button.token", {type: "button", tabIndex: i === (chosen ?? 0) ? 0 : -1, "aria-pressed": i === chosen,
      "data-query": number, "data-token": i, onclick: () => pick(number, i), onfocus: () => pick(number, i)}, text || "␣");
    if (by === "verdict" && query.unreliable?.includes(i)) word.classList.add("doubtful");
    else tint(word, value === -Infinity ? -9 : value, MEASURES[by].reach * 2, MEASURES[by].hues);
    words.append(word);
  });
  return words;
}

function numbers(query) {
  const told = [];
  if (isNumber(query.verdict)) told.push(["teacher − student", signed(query.verdict)], ["JSD", fixed(query.mean_jsd, 3)]);
  if (isNumber(query.credit)) told.push(["own credit", signed(query.credit)]);
  if (isNumber(query.value)) told.push(["value", fixed(query.value)]);
  if (query.unreliable) told.push(["unreliable tokens", `${query.unreliable.length} of ${query.tokens.length}`]);
  if (query.outside) told.push(["outside the teacher's top-k", `${query.outside}`]);
  return told.length ? el("span.numbers", {}, ...told.map(([name, value]) => el("span", {}, `${name} `, el("b", {}, value)))) : null;
}

function detail(query, i) {
  const [student, teacher] = [query.student[i], query.teacher[i]];
  const difference = isNumber(student) && isNumber(teacher) ? teacher - student : null;
  const first = (query.top[i] ?? []).map(([text, share]) => bar(text.trim() || "␣", share ?? 0, text.trim() === query.tokens[i].trim() ? "chosen" : ""));
  return el("div.detail", {role: "status"},
    el("p", {}, el("b", {}, query.tokens[i].trim() || "␣"), " was written. ", isNumber(difference)
      ? `The teacher gives it ${difference >= 0 ? Math.exp(difference).toFixed(1) + " times" : "1/" + Math.exp(-difference).toFixed(1) + " of"} the student's probability: `
        + `teacher − student ${signed(difference)} nats, JSD ${fixed(query.jsd[i], 3)} nats.`
      : `It is outside the teacher's top-k; JSD ${fixed(query.jsd[i], 3)} nats.`),
    query.unreliable?.includes(i) ? el("p.doubt", {}, `Unreliable: both give it less than ${100 * DATA.unreliable} %, so the ratio is that of two small errors.`) : null,
    el("div.bars", {}, bar("student", probability(student), "who"), isNumber(teacher) ? bar("teacher", probability(teacher), "who") : null),
    first.length ? el("p.first", {}, "The teacher's first choices here") : null, el("div.bars", {}, ...first));
}

function bar(name, share, kind) {
  const filled = el("i", {});
  filled.style.width = `${Math.min(100, Math.max(0, 100 * share))}%`;
  return el(`div.bar.${kind || "other"}`, {}, el("span", {}, name), el("div", {}, filled), el("b", {}, percent(share)));
}
