"""A study served over TLS with a certificate of its own, and links with the address in use."""

from __future__ import annotations

import re
import shutil
import signal
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from collect.site import served
from prefopt.cli import main
from prefopt.collect.serve import site_of
from prefopt.config.collect import CollectServeConfig
from prefopt.errors import ConfigError
from prefopt.studies.served import address_of, lock_of, note_address
from studies.small import new_study


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl, which makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    made += ["-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*made, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    return cert, key


@pytest.mark.slow
def test_a_study_is_served_over_tls_and_invitations_name_its_address(
    tmp_path: Path, certificate: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path, (cert, key) = tmp_path / "s.db", certificate
    new_study(path).close()
    command = [sys.executable, "-m", "prefopt", "collect", "serve", str(path), "--port", "0"]
    command += ["--certfile", str(cert), "--keyfile", str(key)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            lines = [server.stdout.readline() for _ in range(3)]
            found = re.search(r"https://127\.0\.0\.1:(\d+)/join/", "".join(lines))
            assert found is not None, lines
            base = f"https://127.0.0.1:{found[1]}"
            context = ssl.create_default_context(cafile=str(cert))
            assert main(["collect", "invite", str(path), "Anna"]) == 0
            link = capsys.readouterr().out.splitlines()[-1]
            assert link.startswith(f"{base}/join/")
            with urllib.request.urlopen(link, context=context, timeout=30) as answer:
                page = answer.read().decode()
            assert "Anna" in page
            secret = re.search(r'name="secret" value="([^"]+)"', page)
            assert secret is not None
            form = urllib.request.Request(
                f"{base}/join",
                f"secret={secret[1]}".encode(),
                headers={"Origin": base, "Sec-Fetch-Site": "same-origin"},
            )
            opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _Stay)
            cookie = opener.open(form, timeout=30).headers["Set-Cookie"]
            assert cookie.startswith("__Host-prefopt-") and "Secure" in cookie
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)
    assert address_of(path) is None


class _Stay(urllib.request.HTTPRedirectHandler):
    def http_error_303(self, req, fp, code, msg, headers):  # type: ignore[no-untyped-def]
        return fp


def test_addresses_of_a_certificate_are_https() -> None:
    site = site_of(CollectServeConfig(study="s", certfile="c.pem"), 8700)
    assert site.secure and "https://127.0.0.1:8700" in site.origins
    assert not any(origin.startswith("http:") for origin in site.origins)
    with pytest.raises(ConfigError, match="give that with --certfile"):
        CollectServeConfig(study="s", keyfile="k.pem")
    with pytest.raises(ConfigError, match="make it https"):
        CollectServeConfig(study="s", certfile="c.pem", url="http://votes.example.org")


def test_a_certificate_that_cannot_be_used_is_one_line(
    tmp_path: Path, certificate: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    new_study(tmp_path / "s.db").close()
    cert, key = certificate
    serve = ["collect", "serve", str(tmp_path / "s.db"), "--certfile"]
    for given, said in (
        ([str(tmp_path / "no.pem")], "No such file or directory; check the path"),
        ([str(cert)], "is no certificate with its key, in PEM"),
        ([str(key), "--keyfile", str(cert)], "is no certificate with its key, in PEM"),
    ):
        assert main([*serve, *given]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_an_invitation_names_the_address_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.db"
    new_study(path).close()
    note_address(path, "http://127.0.0.1:8711")

    def link(*more: str) -> str:
        assert main(["collect", "invite", str(path), "Anna", *more]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if "/join/" in line)

    with lock_of(path):
        assert link().startswith("http://127.0.0.1:8711/join/")
        assert link("--url", "https://votes.example.org/").startswith("https://votes.example.org/join/")
    # What a killed server left behind counts for nothing.
    assert link().startswith("http://127.0.0.1:8700/join/")


def test_the_page_says_how_many_there_are(tmp_path: Path) -> None:
    with served(new_study(tmp_path / "s.db", items=11)) as site:
        anna = site.signed_in("Anna")
        assert "1 of 11" in anna.get("/").text
        assert "第 1 题，共 11 题" in anna.get("/", {"Accept-Language": "zh"}).text
        assert "提示词" in anna.get("/", {"Accept-Language": "zh"}).text
        study = site.study
        study.close()
