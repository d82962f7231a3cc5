// Search of pages that are opened from a disk. Browsers start no Worker from a file: its script runs in a hidden frame instead, which
// speaks as a Worker does. The offline plugin of the theme would fetch a script of this name from elsewhere.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      inside.document.open();  // or Firefox would replace the empty page, and what was put into it
      inside.document.close();
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", {data}));
      const script = inside.document.createElement("script");
      script.src = new URL(url, location.href);
      this.inside = inside;
      this.ready = new Promise((resolve) => { script.onload = resolve; });
      inside.document.documentElement.append(script);
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", {data})));
    }
  };
}
