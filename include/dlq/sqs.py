"""What source and target on SQS share: a queue found by name, URL or ARN, and its attributes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from dlq import aws
from dlq.errors import ConfigError, DlqError, NotFound

BATCH = 10
"""Messages a call may carry (SQS's bound)."""

ABSENT = {"AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist"}
DENIED = {
    "AccessDenied",
    "AccessDeniedException",
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidClientTokenId",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
}
"""Codes of a caller who may not, or is no longer known."""


@dataclass(frozen=True)
class Queue:
    """A queue as SQS describes it."""

    url: str
    arn: str
    attributes: Mapping[str, str]

    @property
    def fifo(self) -> bool:
        return self.arn.endswith(".fifo")

    @property
    def name(self) -> str:
        return self.arn.rpartition(":")[2]

    @property
    def held(self) -> int:
        """Visible, in flight and delayed: about what it holds."""
        return sum(
            int(self.attributes.get(f"ApproximateNumberOfMessages{what}", 0))
            for what in ("", "NotVisible", "Delayed")
        )

    def number(self, attribute: str, default: int) -> int:
        return int(self.attributes.get(attribute, default))

    @property
    def redrive(self) -> Mapping[str, Any]:
        """Its redrive policy, empty where it has none."""
        found: Mapping[str, Any] = json.loads(self.attributes.get("RedrivePolicy") or "{}")
        return found


def md5_of_body(body: str) -> str:
    return hashlib.md5(body.encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()


def md5_of_attributes(attributes: Mapping[str, Mapping[str, Any]]) -> str:
    """The sum of message attributes (Amazon SQS Developer Guide, "Calculating the MD5 message digest for message
    attributes")."""
    digest = hashlib.md5(usedforsecurity=False)
    for name, attribute in sorted(attributes.items()):
        text, kind = attribute.get("StringValue"), attribute["DataType"]
        value = attribute["BinaryValue"] if text is None else text.encode()
        for part in (name.encode(), kind.encode()):
            digest.update(len(part).to_bytes(4, "big") + part)
        digest.update((b"\x02" if text is None else b"\x01") + len(value).to_bytes(4, "big") + value)
    return digest.hexdigest()


def find(client: Any, named: str, field: str, failure: type[DlqError]) -> Queue:
    """The queue ``named`` by name, URL or ARN; ``field`` says where it is configured.

    :raises NotFound: when there is none.
    :raises ConfigError: when it may not be looked at.
    :raises DlqError: of type ``failure``, when SQS doesn't answer.
    """
    try:
        url = named
        if not named.startswith(("http://", "https://")):
            account = {}
            if named.startswith("arn:"):
                _, _, _, _, owner, named = named.split(":", 5)
                account = {"QueueOwnerAWSAccountId": owner}
            url = client.get_queue_url(QueueName=named, **account)["QueueUrl"]
        found = client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
    except ClientError as error:
        code = aws.code(error)
        if code in ABSENT:
            raise NotFound(
                f"{field}: queue {named!r} does not exist in this account and region; create it or name the right one"
            ) from None
        if code in DENIED:
            raise ConfigError(
                f"{field}: queue {named!r} may not be looked at ({code}); grant sqs:GetQueueUrl and "
                "sqs:GetQueueAttributes"
            ) from None
        raise failure(f"queue {named!r} can't be described: {aws.reason(error)}") from error
    except BotoCoreError as error:
        raise failure(
            f"SQS can't be reached: {aws.reason(error)}; are region and endpoint of the Connection right?"
        ) from error
    return Queue(url, found["QueueArn"], found)
