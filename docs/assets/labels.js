/* Names for screen readers that the theme leaves out: its search dialog, and the buttons of each block of code. */
document.querySelector(".md-search").setAttribute("aria-label", "Search")

const label = () =>
  document.querySelectorAll(".md-code__nav:not([aria-label])").forEach(nav => {
    nav.setAttribute("aria-label", `Code of ${nav.closest("pre").id}`)
  })
new MutationObserver(label).observe(document.body, { childList: true, subtree: true })
label()
