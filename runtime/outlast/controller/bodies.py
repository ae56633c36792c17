"""The bodies of HTTP requests that ask something of a running job, read and checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from outlast import faults
from outlast.controller.requests import Request
from outlast.errors import RequestError
from outlast.messages import events as e

LONGEST_S = 86400.0
Seconds = Annotated[float, Field(ge=0, le=LONGEST_S)]


class _Body(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ResizeBody(_Body):
    """POST /resize. All three are given, since the numbers are meant together."""

    replicas: int = Field(ge=1)
    minReplicas: int | None = Field(ge=1)
    spares: int = Field(ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.minReplicas is not None and self.minReplicas > self.replicas:
            raise ValueError(f"minReplicas {self.minReplicas} must be at most replicas, which is {self.replicas}")
        return self

    def request(self) -> Request:
        """For the machine."""
        return e.ResizeRequested(self.replicas, self.minReplicas, self.spares)


class SuspendBody(_Body):
    """POST /suspend."""

    patience_s: Seconds
    reason: str = ""

    def request(self) -> Request:
        """For the machine."""
        return e.SuspendRequested(self.patience_s, self.reason)


class HoldBody(_Body):
    """POST /hold."""

    patience_s: Seconds

    def request(self) -> Request:
        """For the machine."""
        return e.HoldRequested(self.patience_s)


class FaultBody(_Body):
    """POST /fault."""

    fault: str

    def request(self) -> Request:
        """For the machine. Raises RequestError."""
        fault = faults.parse_at_once(self.fault)
        return e.FaultRequested(fault.kind.value, fault.target, fault.part.value if fault.part else None)


_B = TypeVar("_B", ResizeBody, SuspendBody, HoldBody, FaultBody)


def reader(kind: type[_B]) -> Callable[[dict[str, Any]], Request]:
    """A function that makes a request of a body of that kind. It raises RequestError naming what is wrong."""

    def read(body: dict[str, Any]) -> Request:
        try:
            return kind.model_validate(body).request()
        except ValidationError as error:
            raise RequestError("; ".join(_problem(dict(item)) for item in error.errors())) from error

    return read


READERS: dict[str, Callable[[dict[str, Any]], Request]] = {
    "/resize": reader(ResizeBody),
    "/suspend": reader(SuspendBody),
    "/hold": reader(HoldBody),
    "/fault": reader(FaultBody),
}


def _problem(item: dict[str, Any]) -> str:
    where = ".".join(map(str, item["loc"]))
    text = str(item["msg"]).removeprefix("Value error, ")
    return f"{where}: {text}" if where else text
