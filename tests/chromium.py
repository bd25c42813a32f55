"""Drives a headless Chromium through its own debugging pipe, so that no driver need be installed."""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time

NAMES = ("chromium", "chromium-browser", "google-chrome") if sys.platform != "win32" else ()
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)


def pipe():
    """Both ends of one, of numbers that are not those that Chromium looks at."""
    import fcntl  # which Windows has not

    low = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in low]
    for end in low:
        os.close(end)
    return high


class Browser:
    """One page. `requests` has the addresses that it asked for, `errors` what its console said of errors."""

    def __init__(self, profile, width, height=1400, dark=False):
        ours, its = pipe(), pipe()
        options = (
            f"--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --user-data-dir={profile} --remote-debugging-pipe"
        )

        def connect():  # it reads commands from 3 and writes answers to 4
            os.dup2(ours[0], 3)
            os.dup2(its[1], 4)

        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen([CHROMIUM, *options.split()], preexec_fn=connect, pass_fds=(3, 4), **quiet)
        os.close(ours[0])
        os.close(its[1])
        self.write, self.read = os.fdopen(ours[1], "wb", 0), its[0]
        self.numbers, self.buffer, self.session = itertools.count(1), b"", None
        self.requests, self.errors = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height)
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.write.close()
        os.close(self.read)

    def resize(self, width, height=1400):
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def call(self, method, **parameters):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.write.write(json.dumps(message).encode() + b"\0")
        until = time.monotonic() + 60
        while (answer := self._next(until)).get("id") != number:
            self._keep(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self, until):
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(0, until - time.monotonic()))
            assert ready, "Chromium does not answer"
            self.buffer += os.read(self.read, 1 << 20)
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def _keep(self, event):
        parameters = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(parameters["exceptionDetails"])
        elif event.get("method") == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            self.errors.append([each.get("value", each.get("description")) for each in parameters["args"]])
        elif event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"])

    def go(self, url):
        self.call("Page.navigate", url=url)

    def wait_for(self, url, seconds=120):
        """Waits until a server answers, and goes there."""
        end = time.monotonic() + seconds
        while self.call("Page.navigate", url=url).get("errorText"):
            assert time.monotonic() < end, f"nothing answers at {url}"
            time.sleep(0.5)
        self.requests, self.errors = [], []

    def js(self, expression):
        """The value of an expression of JavaScript on the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression, seconds=60):
        """Waits until the expression is true of a page that is there."""
        end = time.monotonic() + seconds
        while not self.js(f"document.body !== null && Boolean({expression})"):
            assert time.monotonic() < end, f"never true: {expression}\n{self.js('document.body.innerText')[:3000]}\n{self.errors}"
            time.sleep(0.05)

    def upload(self, selector, *files):
        """Chooses files in an input of type file."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def picture(self, path, whole=False):
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
