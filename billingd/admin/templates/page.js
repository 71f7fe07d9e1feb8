
"use strict";
(() => {
  const root = document.documentElement;
  const find = (id) => document.getElementById(id);
  const said = find("said"), away = find("away"), ask = find("ask"), pauser = find("pause");
  const every = Number(root.dataset.every) * 1000, patience = 2 * every;
  const busy = new Set();
  let paused = false, asking = null, timer = 0, turn = 0, answered = 0, soon = 0;
  root.classList.add("live");

  // What the server sent is parsed and compared, never run: the policy allows no other script.
  const policy = window.trustedTypes ? trustedTypes.createPolicy("billingd", { createHTML: (text) => text }) : null;
  const parse = (text) => new DOMParser().parseFromString(policy ? policy.createHTML(text) : text, "text/html");

  const key = (node) => (node.nodeType === 1 ? node.dataset.key : undefined);

  // Only what differs is touched, so that focus, a selection and what is read aloud stay as they are.
  function bring(from, to) {
    if (from.isEqualNode(to)) return;
    if (from.nodeType !== to.nodeType || from.nodeName !== to.nodeName || key(from) !== key(to)) {
      from.replaceWith(to);
      return;
    }
    if (from.nodeType !== 1) {
      from.nodeValue = to.nodeValue;
      return;
    }
    for (const { name } of [...from.attributes]) if (!to.hasAttribute(name)) from.removeAttribute(name);
    for (const { name, value } of to.attributes) if (from.getAttribute(name) !== value) from.setAttribute(name, value);
    let at = from.firstChild;
    for (const wanted of [...to.childNodes]) {
      const name = key(wanted);
      if (at && name !== undefined && key(at) !== name) {
        const there = [...from.children].find((one) => key(one) === name);
        from.insertBefore(there || wanted, at);
        if (there) bring(there, wanted);
      } else if (at) {
        const next = at.nextSibling;
        bring(at, wanted);
        at = next;
      } else {
        from.append(wanted);
      }
    }
    while (at) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
  }

  const name = (button) => button.dataset.post;
  function mark() {
    for (const button of document.querySelectorAll("button[data-post]")) button.disabled = busy.has(name(button));
  }

  async function update() {
    clearTimeout(timer);
    const mine = ++turn, given = new AbortController();
    const late = setTimeout(() => given.abort(new Error(`nothing came for ${patience / 1000} s`)), patience);
    try {
      const answer = await fetch(location.pathname + location.search, { headers: { Accept: "text/html" }, signal: given.signal });
      if (!answer.ok) throw new Error(`it answered ${answer.status}`);
      const fresh = parse(await answer.text());
      if (mine !== turn) return; // a later one is on its way
      for (const part of document.querySelectorAll("[data-part]")) {
        const other = fresh.querySelector(`[data-part="${part.dataset.part}"]`);
        if (other) bring(part, document.importNode(other, true));
      }
      answered = mine;
      document.title = fresh.title;
      root.classList.remove("away");
      away.hidden = true;
      mark();
    } catch (error) {
      if (mine < answered) return;
      root.classList.add("away");
      document.title = "No answer · billingd";
      if (away.hidden) away.textContent = `billingd does not answer (${error.message}); what you see is old. It is asked again by itself.`;
      away.hidden = false;
      if (mine !== turn) return; // a later one is on its way: should that come, it is the last word
    } finally {
      clearTimeout(late);
    }
    const pause = soon > 0 ? 1000 : document.hidden ? every * 12 : every;
    soon = Math.max(soon - 1, 0);
    if (!paused) timer = setTimeout(update, pause);
  }

  function say(text, bad) {
    said.classList.toggle("stopped", bad);
    said.textContent = text;
    said.hidden = false;
  }

  async function send(post, body, label, about) {
    busy.add(post);
    mark();
    say(`${label}: ${about} …`, false);
    try {
      const answer = await fetch(post, {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-Billingd": "page" },
        body: JSON.stringify(body),
      });
      const told = await answer.json();
      if (answer.ok) say(`${label}: ${about}, done`, false);
      else say(`${label}: ${about}, refused: ${told.error.message}`, true);
    } catch (error) {
      say(`${label}: ${about}, no answer (${error.message}); look before you try again`, true);
    }
    busy.delete(post);
    soon = 3; // what was begun is over in a moment
    await update();
  }

  function begin(button) {
    const { post, about } = button.dataset, label = button.textContent;
    const wanted = button.dataset.ask, warn = button.dataset.warn;
    if (!wanted && !warn) {
      send(post, {}, label, about);
      return;
    }
    asking = { post, about, label, wanted, from: button };
    find("ask-title").textContent = `${label}: ${about}`;
    find("ask-warn").textContent = warn || "";
    find("ask-warn").hidden = !warn;
    find("ask-label").textContent = wanted || "";
    find("ask-reason-part").hidden = !wanted;
    find("ask-reason").value = "";
    find("ask-reason").required = Boolean(wanted);
    find("ask-do").textContent = label;
    ask.showModal();
    (wanted ? find("ask-reason") : find("ask-cancel")).focus();
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-post]");
    if (button && !button.disabled) begin(button);
  });
  find("ask-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const { post, about, label, wanted } = asking;
    const reason = find("ask-reason").value.trim();
    if (wanted && !reason) {
      find("ask-reason").value = "";
      find("ask-reason").reportValidity();
      return;
    }
    ask.close();
    send(post, wanted ? { reason } : {}, label, about);
  });
  find("ask-cancel").addEventListener("click", () => ask.close());
  pauser.addEventListener("click", () => {
    paused = !paused;
    pauser.setAttribute("aria-pressed", String(paused));
    pauser.textContent = paused ? "Go on updating" : "Pause updates";
    clearTimeout(timer);
    if (!paused) update();
  });
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden && !paused) update();
  });
  timer = setTimeout(update, every);
})();
