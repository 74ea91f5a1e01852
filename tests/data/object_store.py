"""An S3 endpoint of this machine for tests: moto's server, with a bucket to upload folders to.

Processes find it through the environment (`ObjectStore.environment`), as they find a real one. In this process `use`
sets it and drops the clients made before, which keep the endpoint of their time.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from orchestrate.data import storage

BUCKET = "datasets"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",  # never look for a role on the network
}


class ObjectStore:
    """A running endpoint with one bucket."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1",
                                   aws_access_key_id="test", aws_secret_access_key="test")  # fmt: skip
        self.client.create_bucket(Bucket=BUCKET)

    def environment(self, endpoint: str = "") -> dict[str, str]:
        """Variables for a process that uses this store, or another way to it such as a proxy."""
        return {**CREDENTIALS, "AWS_ENDPOINT_URL": endpoint or self.endpoint}

    def use(self, monkeypatch: pytest.MonkeyPatch, endpoint: str = "") -> None:
        """Let s3:// URLs of this process lead here for the test."""
        import s3fs

        for name, value in self.environment(endpoint).items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()

    def put(self, name: str, data: bytes) -> str:
        """Write an object; returns its URL."""
        self.client.put_object(Bucket=BUCKET, Key=name, Body=data, ACL="public-read")  # for plain HTTP too
        return f"s3://{BUCKET}/{name}"

    def http_url(self, name: str, endpoint: str = "") -> str:
        """Name an object for plain HTTP: the server asks for no signature."""
        return f"{endpoint or self.endpoint}/{BUCKET}/{name}"

    def upload(self, folder: str | Path, prefix: str) -> str:
        """Upload a folder; returns the URL of the copy."""
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return storage.join(f"s3://{BUCKET}", prefix)


@contextmanager
def run_object_store() -> Iterator[ObjectStore]:
    """Start a server on a free port and stop it at the end."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # one line per request otherwise
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield ObjectStore("http://{}:{}".format(*server.get_host_and_port()))
    finally:
        server.stop()


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    with run_object_store() as store:
        yield store
